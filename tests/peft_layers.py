"""Models of one PEFT layer, of every kind of layer that PEFT adapts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sdsopt.pairs import LoRAPair


class Holder(nn.Module):
    """A model with one layer, under a name that adapters can target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Stacked(nn.Module):
    """Two stacked expert weights, like a transformers MoE block; `is_transposed` is what PEFT asks it."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 5, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 5))


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))


@dataclass(frozen=True)
class Kind:
    """A kind of layer, its LoRA configuration, and how many pairs PEFT makes of it."""

    build: Callable[[], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    transposed: bool = False  # whether PEFT's ΔW is (in, out)
    pairs: int = 1


# `get_delta_weight` works for all of these. Grouped convolutions, for which it does not, have their own test below.
KINDS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(5, 7)),
    "rslora": Kind(lambda: nn.Linear(5, 7), {"use_rslora": True}),
    "rank pattern": Kind(lambda: nn.Linear(5, 7), {"rank_pattern": {"layer": 3}}),
    "alpha pattern": Kind(lambda: nn.Linear(5, 7), {"alpha_pattern": {"layer": 5}}),
    "dora": Kind(lambda: nn.Linear(5, 7), {"use_dora": True}),
    "lora bias": Kind(lambda: nn.Linear(5, 7), {"lora_bias": True}),
    "gpt conv1d": Kind(lambda: Conv1D(7, 5), {"fan_in_fan_out": True}, transposed=True),
    "embedding": Kind(lambda: nn.Embedding(9, 5), transposed=True),
    "conv1d": Kind(lambda: nn.Conv1d(3, 5, 4)),
    "conv2d": Kind(lambda: nn.Conv2d(3, 5, (2, 3), stride=2, padding=1)),
    "conv2d pointwise": Kind(lambda: nn.Conv2d(3, 5, 1)),
    "conv3d": Kind(lambda: nn.Conv3d(3, 5, (1, 2, 3))),
    "attention": Kind(lambda: nn.MultiheadAttention(6, 2), pairs=2),
    "experts": Kind(lambda: Stacked(False), {"target_parameters": ["layer.up", "layer.down"]}, pairs=2),
    "experts, transposed": Kind(
        lambda: Stacked(True), {"target_parameters": ["layer.up", "layer.down"]}, transposed=True, pairs=2
    ),
    "experts, rslora": Kind(
        lambda: Stacked(False), {"target_parameters": ["layer.up"], "use_rslora": True, "r": 4}, pairs=1
    ),
    "matrix parameter": Kind(Matrix, {"target_parameters": ["layer.weight"]}),
}


def adapted(layer: nn.Module, config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    targets = {} if "target_parameters" in config else {"target_modules": ["layer"]}
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **targets, **config}
    return peft.get_peft_model(Holder(layer), peft.LoraConfig(**options)).double()


def product(pair: LoRAPair) -> Tensor:
    """ΔW of each block: (e, m, n)."""
    return pair.scaling * pair.split_B(pair.B) @ pair.split_A(pair.A)
