"""From PEFT's LoRA layers to `SDSLinear`."""

from __future__ import annotations

from typing import Any

from torch import nn

from sdsopt.errors import NoPairsError, UnsupportedLayerError
from sdsopt.pairs import LoRAPair, find_pairs
from sdsopt.reference.sds_linear import SDSLinear


def convert(model: nn.Module) -> list[SDSLinear]:
    """Puts an `SDSLinear` in the place of every LoRA layer, in place: the same Parameters, scaling and ΔW.

    Args:
        model: A `PeftModel`, or any model that holds PEFT's LoRA layers, with one adapter on linear layers.

    Returns:
        The new layers.

    Raises:
        NoPairsError: There is no trainable LoRA layer.
        UnsupportedLayerError: A layer is no plain LoRA on a linear layer. Nothing is changed then.
    """
    pairs = find_pairs(model)
    if not pairs:
        raise NoPairsError(f"found no trainable LoRA layer to convert in {type(model).__name__}: {pairs}")
    names = {id(module): name for name, module in model.named_modules()}
    layers = {names[id(pair.module)]: _converted(pair) for pair in pairs}  # all of them, before the first is put in
    for name, layer in layers.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer)
    return list(layers.values())


def _converted(pair: LoRAPair) -> SDSLinear:
    reason = _why_not_plain(pair)
    if reason is not None:
        raise UnsupportedLayerError(
            f"{pair.name} cannot take the paper's parametrization: {reason}. Leave it out of target_modules."
        )
    layer: Any = pair.module
    return SDSLinear(layer.base_layer, pair.A, pair.B, pair.scaling, layer.lora_dropout[pair.adapter])


def _why_not_plain(pair: LoRAPair) -> str | None:
    layer: Any = pair.module
    if pair.path_A != f"lora_A.{pair.adapter}.weight" or pair.A.ndim != 2 or hasattr(layer, "parameter_name"):
        return "it is no linear layer with LoRA, and the paper defines it for those alone"
    variant = getattr(layer, "lora_variant", {}).get(pair.adapter)
    if variant is not None:
        return f"its update is not s·B·A but a variant of it ({type(variant).__name__})"
    if getattr(layer, "lora_bias", {}).get(pair.adapter):
        return "it has a bias beside B·A (lora_bias)"
    if len(layer.lora_A) > 1 or layer.merged:
        return "it is merged, or has a second adapter beside this one"
    return None
