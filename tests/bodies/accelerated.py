"""What processes run with FSDP2 through Accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist

from bodies.common import Case, State, network, optimizer_of, train, whole


@contextmanager
def accelerator() -> Iterator[Any]:
    """An Accelerator as a launch with FSDP2 makes it, on CPUs.

    Accelerate itself offers FSDP on GPUs alone, so it is told that there are several.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    with mock.patch.dict(os.environ, environment):
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="NO_WRAP",
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )
        try:
            yield Accelerator(fsdp_plugin=plugin)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def training(case: Case) -> State:
    with accelerator() as accelerate:
        model = network(case)
        model, optimizer = accelerate.prepare(model, optimizer_of(model, case))
        train(model, optimizer, case)
        return whole(model)


def resuming(case: Case, folder: str) -> tuple[State, State]:
    """Trains on after a saved state, and once more from that state in new objects."""
    ends: list[State] = []
    for load in (False, True):
        with accelerator() as accelerate:
            model = network(case)
            model, optimizer = accelerate.prepare(model, optimizer_of(model, case))
            if load:
                accelerate.load_state(folder)
            else:
                train(model, optimizer, case)
                accelerate.save_state(folder)
            train(model, optimizer, case, first=case.steps)
            ends.append(whole(model))
    return ends[0], ends[1]
