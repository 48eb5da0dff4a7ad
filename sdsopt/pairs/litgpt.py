"""LitGPT: loralib's names, with one projection for queries, keys and values of different widths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch import nn

from sdsopt.pairs.attributes import own_parameter
from sdsopt.pairs.blocks import UnequalGroups
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.pair import LoRAPair


@final
class LitGPTLayout(Layout):
    """`LoRAQKVLinear`; LitGPT's other layers are loralib's."""

    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        rows: list[int] | None = vars(module).get("qkv_shapes")
        if rows and own_parameter(module, "lora_A") is not None and own_parameter(module, "lora_B") is not None:
            yield LoRAPair(name, module, "default", "lora_A", "lora_B", UnequalGroups(tuple(rows)), _scaling)


def _scaling(module: Any) -> float:
    return module.scaling
