"""NVIDIA NeMo: Automodel's `lora_A`/`lora_B` layers and experts, and Megatron's `linear_in`/`linear_out`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch import nn

from sdsopt.pairs.attributes import own_module, own_parameter, own_weight
from sdsopt.pairs.blocks import Groups, TransposedExperts
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.pair import LoRAPair

_PROJECTIONS = ("gate_and_up", "down")


@final
class NeMoLayout(Layout):
    """Automodel's `LinearLoRA` and `GroupedExpertsLoRA`, Megatron-Bridge's adapters."""

    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        if own_weight(module, "lora_A") is not None and own_weight(module, "lora_B") is not None:
            yield LoRAPair(name, module, "default", "lora_A.weight", "lora_B.weight", Groups(), _scale)
        for projection in _PROJECTIONS:
            path_A, path_B = f"lora_{projection}_A", f"lora_{projection}_B"
            A = own_parameter(module, path_A)
            if A is not None and A.ndim == 3 and own_parameter(module, path_B) is not None:
                blocks = TransposedExperts(A.shape[0])
                yield LoRAPair(f"{name}.{projection}", module, "default", path_A, path_B, blocks, _scale)
        if own_weight(module, "linear_in") is not None and own_weight(module, "linear_out") is not None:
            yield from _megatron(name, module)


def _megatron(name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
    if not hasattr(module, "alpha") or not hasattr(module, "dim"):
        return
    if any(_is_sharded(own_module(module, child)) for child in ("linear_in", "linear_out")):
        yield Skipped(name, "Megatron tensor parallelism shards one factor as a plain tensor")
        return
    yield LoRAPair(name, module, "default", "linear_in.weight", "linear_out.weight", Groups(), _alpha_over_dim)


def _is_sharded(layer: Any) -> bool:
    return any(
        getattr(layer, f"{side}_size_per_partition", None) != getattr(layer, f"{side}_size", None)
        for side in ("input", "output")
        if hasattr(layer, f"{side}_size_per_partition")
    )


def _scale(module: Any) -> float:
    return module.scale


def _alpha_over_dim(module: Any) -> float:
    return module.alpha / module.dim
