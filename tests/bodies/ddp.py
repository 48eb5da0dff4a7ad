"""What processes run with DistributedDataParallel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

import sdsopt
from bodies.common import Case, State, inner_of, network, optimizer_of, train, whole
from sdsopt.corrections import Correction, Factors, PairTensors


@dataclass(frozen=True)
class NeedsBoth(Correction):
    """Adds to each gradient a number that depends on the other one."""

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        assert gradients.A is not None
        assert gradients.B is not None
        return PairTensors(gradients.A + gradients.B.mean(), gradients.B + gradients.A.mean())


def training(case: Case) -> State:
    model = network(case)
    parallel = DistributedDataParallel(model)
    train(parallel, optimizer_of(parallel, case), case)
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


def inside_zero(case: Case) -> State | str:
    """The other way round; returns the error, if there is one."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch.jit

    model: Any = network(case)
    parallel: nn.Module = DistributedDataParallel(model)
    sdsopt.link(model)
    try:
        options = {"correction": case.correction, **dict(case.options)}
        outer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=sdsopt.SDSAdamW, lr=0.01, **options)
        train(parallel, outer, case)
    except sdsopt.errors.SDSOptError as error:
        return f"{type(error).__name__}: {error}"
    return whole(model)
