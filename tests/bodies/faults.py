"""What goes wrong in one process."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from bodies.checkpoints import part_of_a_run
from bodies.common import Case, State, batch, network, optimizer_of, share, train, whole
from bodies.fsdp2 import sharded
from sdsopt.corrections import Correction, Factors, PairTensors
from toy import lora_linear


def killed_in_a_step(case: Case, folder: str) -> None:
    """Saves after `case.steps` steps; in the second step after that, one process is killed.

    The inner optimizer has stepped by then, and a correction of updates has not followed yet.
    """
    part_of_a_run(case, 0, None, folder)
    calls = 0
    original = AdamW.step

    def step(self: AdamW, closure: Any = None) -> Any:
        nonlocal calls
        result = original(self, closure)
        calls += 1
        if calls == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    with mock.patch.object(AdamW, "step", step):
        part_of_a_run(case, case.steps, folder, None)


def overflow_in_one_process(case: Case, how: str) -> dict[str, Any]:
    """The input of one process is infinite; the scaler must skip in all."""
    model = sharded(case) if how == "fsdp2" else network(case)
    trained = DistributedDataParallel(model) if how == "ddp" else model
    optimizer = optimizer_of(model, case)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = whole(model)
    moved: list[bool] = []
    for step in range(2):
        optimizer.zero_grad()
        part = share(batch(step, case.dtype))
        if step == 0 and dist.get_rank() == 1:
            part = part * torch.inf
        scaler.scale(trained(part).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(before[name], tensor) for name, tensor in whole(model).items()))
    return {"moved": moved, "scale": scaler.get_scale(), "state": whole(model)}


class Branches(nn.Module):
    """Two adapters, the second of which a process may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.always = lora_linear(6, 8, 4, seed=1)
        self.sometimes = lora_linear(6, 8, 4, seed=2)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        y = self.always(x)
        return y + self.sometimes(x) if both else y


def branches(case: Case) -> State:
    """DDP, where only the first process runs the second adapter; alone, one that sees all batches in turn."""
    model = Branches()
    optimizer = optimizer_of(model, case)
    together = dist.is_initialized()
    trained = DistributedDataParallel(model, find_unused_parameters=True) if together else model
    for step in range(case.steps):
        optimizer.zero_grad()
        parts = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(step))
        for rank in [dist.get_rank()] if together else [0, 1]:
            loss = trained(parts[rank], rank == 0).square().mean()
            (loss if together else loss / 2).backward()
        optimizer.step()
    return whole(model)


@dataclass(frozen=True)
class Noisy(Correction):
    """Adds noise from a generator of its own, which all processes seed alike."""

    seed: int

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        generator = torch.Generator().manual_seed(self.seed)
        return gradients.map(lambda g: g + 0.1 * g.norm() * torch.randn(g.shape, generator=generator, dtype=g.dtype))


def noisy(how: str) -> State:
    case = Case("sds", options=())
    torch.manual_seed(0 if not dist.is_initialized() else dist.get_rank())  # the global generators differ
    model = sharded(case) if how == "fsdp2" else network(case)
    inner = AdamW(model.parameters(), lr=0.01)
    from sdsopt import SDSPreconditioner

    train(
        DistributedDataParallel(model) if how == "ddp" else model,
        SDSPreconditioner(inner, model, Noisy(seed=5)),
        case,
    )
    return whole(model)
