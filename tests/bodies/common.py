"""Training as all bodies do it, in one process or in several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from sdsopt import SDSPreconditioner
from toy import Network

BATCH = 24  # divides by all numbers of processes and of micro-batches


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        correction: The correction; None leaves the optimizer bare.
        dtype: The parameters' dtype.
        steps: Optimizer steps.
        micro: Micro-batches in a step.
        options: Further options of `SDSPreconditioner`.
    """

    correction: str | None = "sds"
    dtype: torch.dtype = torch.float32
    steps: int = 5
    micro: int = 1
    options: tuple[tuple[str, Any], ...] = ()


def network(case: Case) -> Network:
    return Network(dtype=case.dtype)


def optimizer_of(model: nn.Module, case: Case) -> Optimizer:
    inner = AdamW(model.parameters(), lr=0.01)
    return inner if case.correction is None else SDSPreconditioner(inner, model, case.correction, **dict(case.options))


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def share(tensor: Tensor) -> Tensor:
    """This process's part of a batch; all of it, if there is one process."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else tensor


def train(model: nn.Module, optimizer: Optimizer, case: Case, first: int = 0) -> None:
    for step in range(first, first + case.steps):
        optimizer.zero_grad()
        for part in share(batch(step, case.dtype)).chunk(case.micro):
            (model(part).float().square().mean() / case.micro).backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered where they are sharded."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def alone(case: Case) -> dict[str, Tensor]:
    """What one process comes to on the whole batches."""
    model = network(case)
    train(model, optimizer_of(model, case), case)
    return whole(model)


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Records sdsopt's own collectives: the name of each, and the bytes that this process hands to it."""
    calls: list[tuple[str, int]] = []
    originals: dict[str, Callable[..., Any]] = {}

    def recording(name: str, which: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((name, arguments[which].nbytes))
            return originals[name](*arguments, **options)

        return call

    for name, which in (("all_reduce", 0), ("all_to_all_single", 1), ("all_gather", 1)):
        originals[name] = getattr(dist, name)
        setattr(dist, name, recording(name, which))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
