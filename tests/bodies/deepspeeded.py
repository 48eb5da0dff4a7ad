"""What processes run with DeepSpeed ZeRO, on CPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

import sdsopt
from bodies.common import Case, State, batch, inner_of, network, optimizer_of, share
from sdsopt.errors import SDSOptError


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


def training(case: Case, stage: int) -> State:
    """Hook mode."""
    model = network(case)
    with engine_of(model, inner_of(model, case), case, stage) as engine:
        with sdsopt.attach(model, case.correction or "lora"):
            steps(engine, case)
        return whole(model)


def refusals(case: Case, stage: int) -> tuple[str, str]:
    """The errors of hook mode, and of wrapper mode."""
    model = network(case)
    with engine_of(model, optimizer_of(model, case), case, stage) as engine:
        hooked = _error_of(lambda: sdsopt.attach(model, case.correction or "lora"))
        return hooked, _error_of(lambda: steps(engine, case))


def _error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except SDSOptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


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
