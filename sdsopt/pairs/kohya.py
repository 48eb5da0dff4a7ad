"""kohya's sd-scripts and LyCORIS: modules with `lora_down` and `lora_up` beside the layer that they adapt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch import nn

from sdsopt.pairs.attributes import own_module, own_parameter, own_weight
from sdsopt.pairs.blocks import Groups
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.pair import LoRAPair


@final
class KohyaLayout(Layout):
    """`LoRAModule`, with one pair for each entry of `split_dims`, and LyCORIS's `LoConModule`.

    Both are recognised as long as they are children of the model, or given by themselves.
    """

    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        name = name or str(vars(module).get("lora_name", ""))
        down, up = own_module(module, "lora_down"), own_module(module, "lora_up")
        if isinstance(down, nn.ModuleList) and isinstance(up, nn.ModuleList):
            for index in range(min(len(down), len(up))):
                paths = f"lora_down.{index}.weight", f"lora_up.{index}.weight"
                yield LoRAPair(f"{name}.{index}", module, "default", *paths, Groups(), _scaling)
        elif own_module(module, "lora_mid") is not None:
            yield Skipped(name, "a Tucker decomposition: lora_mid stands between lora_up and lora_down")
        elif own_weight(module, "lora_down") is not None and own_weight(module, "lora_up") is not None:
            yield LoRAPair(name, module, "default", "lora_down.weight", "lora_up.weight", Groups(), _scaling)
        elif hasattr(type(module), "weight_list") and any(True for _ in module.parameters()):
            kind = getattr(type(module), "name", type(module).__name__)
            yield Skipped(name, f"LyCORIS's {kind} is not a plain product B·A")


def _scaling(module: Any) -> float:
    scalar = own_parameter(module, "scalar")  # LyCORIS may train one
    return module.scale * module.multiplier * (1.0 if scalar is None else scalar.item())
