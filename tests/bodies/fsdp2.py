"""What processes run with FSDP2."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import fully_shard

from bodies.common import Case, State, network, optimizer_of, train, whole
from toy import Network


def sharded(case: Case, **options: Any) -> Network:
    """A network whose layers are sharded one by one."""
    model = network(case)
    for layer in (model.first, model.second, model):
        fully_shard(layer, **options)
    return model


def training(case: Case) -> State:
    model = sharded(case)
    train(model, optimizer_of(model, case), case)
    return whole(model)
