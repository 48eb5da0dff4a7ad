"""What processes run with FSDP2."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.fsdp import fully_shard

from bodies.common import Case, network, optimizer_of, train, whole
from toy import Network


def sharded(case: Case) -> Network:
    model = network(case)
    for layer in (model.first, model.second, model):
        fully_shard(layer)
    return model


def training(case: Case) -> dict[str, Tensor]:
    model = sharded(case)
    train(model, optimizer_of(model, case), case)
    return whole(model)
