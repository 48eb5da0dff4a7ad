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
from torch.optim import SGD, AdamW, Optimizer

from sdsopt import SDSPreconditioner
from sdsopt.errors import SDSOptError
from toy import Network

BATCH = 24  # divides by all numbers of processes and of micro-batches

State = dict[str, Tensor]


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


def inner_of(model: nn.Module, case: Case) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # AdamW divides by the gradient's own size, so it would make bfloat16 rounding as large as the step.
    return SGD(trained, lr=0.3, momentum=0.5) if case.dtype == torch.bfloat16 else AdamW(trained, lr=0.01)


def optimizer_of(model: nn.Module, case: Case, inner: Optimizer | None = None) -> Optimizer:
    inner = inner or inner_of(model, case)
    return inner if case.correction is None else SDSPreconditioner(inner, model, case.correction, **dict(case.options))


def batch(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, 10, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)


def share(tensor: Tensor, index: int | None = None, count: int | None = None) -> Tensor:
    """This process's part of a batch; all of it, if there is one process."""
    if not dist.is_initialized():
        return tensor
    return tensor.chunk(count or dist.get_world_size())[dist.get_rank() if index is None else index]


def train(model: nn.Module, optimizer: Optimizer, case: Case, first: int = 0) -> None:
    for step in range(first, first + case.steps):
        optimizer.zero_grad()
        for part in share(batch(step, case.dtype)).chunk(case.micro):
            (model(part).float().square().mean() / case.micro).backward()
        optimizer.step()


def whole(model: nn.Module) -> State:
    """All trained parameters, gathered where they are sharded."""
    trained = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in trained}


def alone(case: Case) -> State:
    """What one process comes to on the whole batches."""
    model = network(case)
    train(model, optimizer_of(model, case), case)
    return whole(model)


def error_of(call: Callable[[], object]) -> str:
    """The error of sdsopt's that a call ends in, by class and message."""
    try:
        call()
    except SDSOptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


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
