"""An inner optimizer that remembers the gradients it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdsopt import Correction, SDSPreconditioner


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
