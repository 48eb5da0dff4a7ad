"""An inner optimizer that remembers the gradients it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdsopt import Correction, SDSPreconditioner
from toy import Network


class Recorder(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.0)
        self.seen: dict[Tensor, Tensor] = {}

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        assert closure is None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.seen = {p: p.grad.clone(memory_format=torch.preserve_format) for p in parameters}


def corrected_gradients(
    model: nn.Module, correction: str | Correction, damping: float = 1e-6, **options: Any
) -> dict[Tensor, Tensor]:
    """What an inner optimizer sees of the model's present gradients."""
    recorder = Recorder(p for p in model.parameters() if p.requires_grad)
    SDSPreconditioner(recorder, model, correction, damping=damping, **options).step()
    return recorder.seen


def correct_by_hand(model: nn.Module) -> None:
    """Puts gradients corrected by `sds` in place of the model's present ones, for a bare optimizer to step on."""
    for parameter, gradient in corrected_gradients(model, "sds").items():
        parameter.grad = gradient


def train_by_hand(model: Network, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    """What `train` must do to the model with the same optimizer inside the wrapper."""
    for step in range(first, first + steps):
        model.zero_grad()
        model.loss(step).backward()
        correct_by_hand(model)
        optimizer.step()
