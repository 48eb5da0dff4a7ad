"""What processes run with the first FSDP."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from bodies.common import Case, State, network, optimizer_of, train
from sdsopt.errors import SDSOptError


def training(case: Case, strategy: str, original: bool) -> State | str:
    """The parameters, or the error."""
    model = FullyShardedDataParallel(
        network(case),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=original,
        device_id=torch.device("cpu"),
    )
    try:
        train(model, optimizer_of(model, case), case)
    except SDSOptError as error:
        return f"{type(error).__name__}: {error}"
    with FullyShardedDataParallel.summon_full_params(model):
        return {name.removeprefix("_fsdp_wrapped_module."): p.detach().clone() for name, p in model.named_parameters()}
