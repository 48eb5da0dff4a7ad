"""What processes run with DistributedDataParallel."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import sdsopt
from bodies.common import Case, State, error_of, inner_of, network, optimizer_of, train, whole


def training(case: Case) -> State:
    model = network(case)
    parallel = DistributedDataParallel(model)
    train(parallel, optimizer_of(parallel, case), case)
    return whole(model)


def first_one_evaluates_others(case: Case) -> State:
    """Between two steps the first process takes other weights, and its own again."""
    model = network(case)
    parallel = DistributedDataParallel(model)
    optimizer = optimizer_of(parallel, case)
    for step in range(case.steps):
        train(parallel, optimizer, replace(case, steps=1), first=step)
        if dist.get_rank() == 0:
            own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            model.load_state_dict({name: 0.9 * tensor for name, tensor in own.items()})
            model.load_state_dict(own)
    return whole(model)


def hooks(case: Case) -> State:
    model = network(case)
    parallel = DistributedDataParallel(model)
    with sdsopt.attach(parallel, case.correction or "lora"):
        train(parallel, inner_of(parallel, case), case)
    return whole(model)


def around_zero(case: Case) -> State:
    """The wrapper around an optimizer that shares its state out among the processes."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit

    model = network(case)
    parallel = DistributedDataParallel(model)
    inner = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=AdamW, lr=0.01)
    train(parallel, optimizer_of(parallel, case, inner), case)
    return whole(model)


def inside_zero(case: Case) -> str:
    """The other way round; returns the error."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network(case)
    sdsopt.link(model)
    return error_of(
        lambda: ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=sdsopt.SDSAdamW, lr=0.01, correction=case.correction
        )
    )
