"""A LoRA adapter without its base model: the parameters and gradients that an optimizer's step works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sdsopt.bench.shapes import LayerShape, ModelShape


class _Layer(nn.Module):
    """One layer's factors under PEFT's names, so that every implementation finds them."""

    def __init__(self, shape: LayerShape, rank: int, options: dict[str, Any]) -> None:
        super().__init__()
        width = rank * shape.experts
        self.lora_A = nn.ModuleDict({"default": nn.Linear(shape.columns, width, bias=False, **options)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(width, shape.rows, bias=False, **options)})
        self.scaling = {"default": 2.0}
        if shape.experts > 1:
            self.parameter_name, self.num_experts = "weight", shape.experts


class Adapter(nn.Module):
    """LoRA layers of a model's true dimensions, with fixed gradients.

    Args:
        shape: The model.
        blocks: How many of its blocks.
        rank: r.
        dtype: Of parameters and gradients.
        device: Where they are.
    """

    def __init__(self, shape: ModelShape, blocks: int, rank: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        options = {"dtype": dtype, "device": device}
        self.layers = nn.ModuleList(_Layer(layer, rank, options) for _ in range(blocks) for layer in shape.block)
        with torch.no_grad():
            for parameter in self.parameters():
                # About what training leaves: the columns of B and the rows of A are neither equal nor orthogonal.
                parameter.normal_(std=0.02)
        if device == "cpu":
            # glibc gives small blocks back to the system until a larger one was freed, as every training step does.
            torch.empty(31 * 2**20, dtype=torch.uint8)
        self._gradients = [torch.randn_like(parameter) for parameter in self.parameters()]

    @property
    def num_bytes(self) -> int:
        """Of the parameters."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    @property
    def num_pairs(self) -> int:
        """The number of pairs; stacked experts are one."""
        return len(self.layers)

    def backward(self) -> None:
        """Gives every parameter its gradient anew, through autograd, so that backward hooks see it."""
        self.zero_grad()
        terms = [_Given.apply(p, g) for p, g in zip(self.parameters(), self._gradients, strict=True)]
        torch.autograd.backward(terms)


class _Given(torch.autograd.Function):
    """A scalar whose derivative is a given gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Parameter, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.gradient.clone(), None
