"""What processes run with DeepSpeed ZeRO, on CPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import sdsopt
from bodies.common import Case, State, batch, error_of, inner_of, network, optimizer_of, share
from sdsopt.corrections import Correction, Factors, PairTensors


@contextmanager
def engine_of(model: nn.Module, optimizer: Optimizer, case: Case, stage: int) -> Iterator[Any]:
    """DeepSpeed's engine around a model."""
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()))
    import deepspeed

    # Its shared-memory collectives would be compiled first, for minutes.
    deepspeed.ops.__compatible_ops__.clear()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.micro,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # else it clips at 1
        "bf16": {"enabled": case.dtype == torch.bfloat16},
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    try:
        yield engine
    finally:
        engine.destroy()


def steps(engine: Any, case: Case) -> None:
    for step in range(case.steps):
        for part in share(batch(step, case.dtype)).chunk(case.micro):
            engine.backward(engine(part).float().square().mean())
            engine.step()


def whole(model: nn.Module) -> State:
    """All parameters, gathered at stage 3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def training(case: Case, stage: int, attach_first: bool = False) -> State:
    """Hook mode, with hooks that are there before DeepSpeed's own or after."""
    model = network(case)
    early = sdsopt.attach(model, case.correction or "lora") if attach_first else None
    with engine_of(model, inner_of(model, case), case, stage) as engine:
        with early or sdsopt.attach(model, case.correction or "lora"):
            steps(engine, case)
        return whole(model)


def refusals(case: Case, stage: int) -> tuple[str, str]:
    """The errors of hook mode, and of wrapper mode."""
    model = network(case)
    with engine_of(model, optimizer_of(model, case), case, stage) as engine:
        hooked = error_of(lambda: sdsopt.attach(model, case.correction or "lora"))
        return hooked, error_of(lambda: steps(engine, case))


def alone(case: Case) -> State:
    """One process with DeepSpeed's arithmetic: for bfloat16, a model of that dtype beside float32 master weights."""
    model, master = network(case), network(Case(dtype=torch.float32))
    master.load_state_dict(model.state_dict())
    optimizer = inner_of(master, case)
    with sdsopt.attach(model, case.correction or "lora"):
        for step in range(case.steps):
            model.zero_grad()
            for part in batch(step, case.dtype).chunk(case.micro):
                (model(part).float().square().mean() / case.micro).backward()
            for parameter, copy in zip(model.parameters(), master.parameters(), strict=True):
                assert parameter.grad is not None
                copy.grad = parameter.grad.float()
            optimizer.step()
            model.load_state_dict(master.state_dict())
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Collectives(TorchDispatchMode):
    """Counts all collectives by name. CommDebugMode's module hooks do not get on with DeepSpeed's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def collectives_of_stage_3(case: Case) -> tuple[dict[str, int], dict[str, int]]:
    """All collectives of a training, with the correction and without it."""
    counts: list[dict[str, int]] = []
    for correction in (case.correction, None):
        model = network(case)
        with engine_of(model, inner_of(model, case), case, 3) as engine, Collectives() as mode:
            with nullcontext() if correction is None else sdsopt.attach(model, correction):
                steps(engine, case)
            counts.append(mode.counts)
    return counts[0], counts[1]


@dataclass(frozen=True)
class ReadsFactors(Correction):
    """Linear in each gradient, but it looks at the factors themselves."""

    linear_per_factor = True

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        return gradients.map(lambda gradient: gradient * (1 + factors.A.norm()))


def refusals_of_stage_3(case: Case) -> tuple[str, str]:
    """The errors of a correction that reads factors, and of hooks that were there before DeepSpeed's own."""
    model = network(case)
    with engine_of(model, inner_of(model, case), case, 3):
        whole = error_of(lambda: sdsopt.attach(model, ReadsFactors()))
    model = network(case)
    handle = sdsopt.attach(model)
    with engine_of(model, inner_of(model, case), case, 3) as engine:
        early = error_of(lambda: steps(engine, case))
    handle.remove()
    return whole, early


class StandIn(AdamW):
    """For DeepSpeedCPUAdam."""

    def __init__(self, params: Any, lr: float, weight_decay: float, adamw_mode: bool) -> None:
        del adamw_mode
        super().__init__(params, lr=lr, weight_decay=weight_decay)


def replaced(case: Case, stage: int) -> tuple[str, str]:
    """The errors where the optimizer is replaced before DeepSpeed gets it: of a bare one, and of the wrapper."""
    from accelerate.utils.deepspeed import map_pytorch_optim_to_deepspeed

    messages: list[str] = []
    for correction in (None, case.correction):
        model = network(case)
        given = optimizer_of(model, replace(case, correction=correction))
        with mock.patch("deepspeed.ops.adam.DeepSpeedCPUAdam", StandIn):
            other = map_pytorch_optim_to_deepspeed(given)
        with engine_of(model, other, case, stage) as engine:
            messages.append(error_of(lambda engine=engine: steps(engine, case)))
        del given  # alive until here, as in a user's script
    return messages[0], messages[1]
