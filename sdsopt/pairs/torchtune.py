"""torchtune: layers `lora_a` and `lora_b`, and stacked experts with transposed factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch import nn

from sdsopt.pairs.attributes import own_parameter, own_weight
from sdsopt.pairs.blocks import Groups, TransposedExperts
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.pair import LoRAPair

_PROJECTIONS = ("gate", "down", "up")


@final
class TorchtuneLayout(Layout):
    """`LoRALinear`, `DoRALinear` and `LoRAGroupedExperts`."""

    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        if own_weight(module, "lora_a") is not None and own_weight(module, "lora_b") is not None:
            yield LoRAPair(name, module, "default", "lora_a.weight", "lora_b.weight", Groups(), _scaling)
        for projection in _PROJECTIONS:
            path_A, path_B = f"lora_{projection}_a", f"lora_{projection}_b"
            A = own_parameter(module, path_A)
            if A is not None and A.ndim == 3 and own_parameter(module, path_B) is not None:
                blocks = TransposedExperts(A.shape[0])
                yield LoRAPair(f"{name}.{projection}", module, "default", path_A, path_B, blocks, _scaling)


def _scaling(module: Any) -> float:
    return module.alpha / module.rank
