"""The training loop that users write by hand, with everything that PyTorch offers for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from sdsopt import SDSPreconditioner, attach
from toy import Network, assert_same

# The three ways to correct, all beside "plain".
METHODS = ["sds", "sds-split", "hooks"]


def adamw(parameters: Iterable[Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.02, weight_decay=0.1)


def corrected(
    network: torch.nn.Module,
    method: str,
    make: Callable[[Iterable[Parameter]], Optimizer] = adamw,
    **options: Any,
) -> Optimizer:
    """An optimizer for the network, corrected by the wrapper, by hooks, or ("plain") not at all."""
    inner = make(network.parameters())
    if method == "hooks":
        attach(network, **options)
    return inner if method in {"plain", "hooks"} else SDSPreconditioner(inner, network, method, **options)


def no_scaler() -> Any:
    return torch.amp.GradScaler("cpu", enabled=False)  # pyright: ignore


@dataclass
class Loop:
    """Trains on the batches that it is told, and keeps what a checkpoint must hold."""

    network: Network
    optimizer: Optimizer
    scheduler: Any = None
    scaler: Any = field(default_factory=no_scaler)
    clip: float | None = None
    accumulate: int = 1
    autocast: torch.dtype | None = None
    overflow_at: int = -1  # the batch whose loss is infinite

    def run(self, first: int, last: int) -> Loop:
        for batch in range(first, last):
            with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):  # pyright: ignore
                loss = self.network.loss(batch) / self.accumulate
            self.scaler.scale(loss * (torch.inf if batch == self.overflow_at else 1)).backward()
            if (batch + 1) % self.accumulate == 0:
                self.step()
        return self

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            clip_grad_norm_(self.network.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(1.0)  # the same for all, so that the rates can be compared
        elif self.scheduler is not None:
            self.scheduler.step()

    @property
    def _parts(self) -> list[Any]:
        return [part for part in (self.network, self.optimizer, self.scheduler, self.scaler) if part is not None]

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self._parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> Loop:
        for part, state in zip(self._parts, torch.load(io.BytesIO(saved), weights_only=True), strict=True):
            part.load_state_dict(state)
        return self


def assert_resumes(make: Callable[[], Loop], middle: int = 4, last: int = 8) -> Loop:
    """A run that is saved, and taken up by new objects, ends where the uninterrupted one does. Returns the latter."""
    whole = make().run(0, last)
    resumed = make().load(make().run(0, middle).save()).run(middle, last)
    assert_same(whole.network, resumed.network)
    return whole


def assert_corrected(network: torch.nn.Module, plain: torch.nn.Module) -> None:
    """Every LoRA factor has moved elsewhere than without a correction."""
    factors = [name for name, _ in network.named_parameters() if "lora_" in name]
    assert factors
    for name in factors:
        assert not torch.allclose(network.get_parameter(name), plain.get_parameter(name), rtol=1e-4), name
