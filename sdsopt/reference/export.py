"""From `SDSLinear` to an adapter that PEFT loads."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sdsopt.errors import NoPairsError
from sdsopt.extras import extra
from sdsopt.reference.sds_linear import SDSLinear

_PREFIX = "base_model.model."  # what PEFT puts before the names of the model that it wraps
# Initialisations that change the base layer: loading the adapter would change it once more, for another rank.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def export_adapter(model: nn.Module, directory: str | Path, adapter: str = "default") -> None:
    """Writes the update as a plain LoRA adapter: A₂ = [A; Q_A], B₂ = [Q_B, B], of rank 2r, with the same ΔW.

    `PeftModel.from_pretrained(base_model, directory)` loads it. Modules that PEFT trains whole (`modules_to_save`) are
    written with it. Before the split it is the LoRA adapter of rank r.

    Args:
        model: A model with `SDSLinear` layers: a `PeftModel` that was converted, or any other.
        directory: Where `adapter_config.json` and `adapter_model.safetensors` go.
        adapter: The adapter's name in a `PeftModel`.

    Raises:
        NoPairsError: There is no `SDSLinear`.
        ValueError: The adapter was initialised by a method that changes the base layer, such as PiSSA.
        MissingExtraError: peft is not installed.
    """
    with extra("peft"):
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

    layers = {name.removeprefix(_PREFIX): m for name, m in model.named_modules() if isinstance(m, SDSLinear)}
    if not layers:
        raise NoPairsError(f"{type(model).__name__} has no SDSLinear layer to export")
    config = _config(model, layers, adapter)
    tensors: dict[str, Tensor] = {}
    if hasattr(model, "peft_config"):  # what PEFT trains beside the LoRA layers
        tensors |= get_peft_model_state_dict(model, model.state_dict(), adapter)
    for name, layer in layers.items():
        for factor, tensor in zip("AB", layer.as_lora(), strict=True):
            tensors[f"{_PREFIX}{name}.lora_{factor}.weight"] = tensor.contiguous()
    Path(directory).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(directory))
    save_file(tensors, Path(directory) / "adapter_model.safetensors", metadata={"format": "pt"})


def _config(model: Any, layers: dict[str, SDSLinear], adapter: str) -> Any:
    with extra("peft"):
        from peft import LoraConfig

    if hasattr(model, "peft_config"):
        config = copy.deepcopy(model.peft_config[adapter])
    else:
        config = LoraConfig(target_modules=list(layers))
    init = str(config.init_lora_weights).lower()
    if init.startswith(_CHANGES_BASE):
        raise ValueError(
            f"the adapter was initialised by {init}, which changed the base layers, so a plain adapter does not hold "
            "all of the update; start from plain LoRA"
        )
    ranks = {name: len(layer.as_lora()[0]) for name, layer in layers.items()}
    # PEFT's scaling is alpha / rank. An anchored pattern for each layer, since both may differ between layers.
    patterns = {name: f"^{re.escape(name)}" for name in layers}
    config.rank_pattern = {patterns[name]: rank for name, rank in ranks.items()}
    config.alpha_pattern = {patterns[name]: layer.scaling * ranks[name] for name, layer in layers.items()}
    config.r = max(ranks.values())
    config.lora_alpha = config.r
    config.use_rslora = False
    config.init_lora_weights = True
    config.inference_mode = True
    return config
