"""Distributed checkpoints, saved and loaded by different numbers of processes."""

from __future__ import annotations

from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bodies.common import Case, State, optimizer_of, train, whole
from bodies.fsdp2 import sharded


def part_of_a_run(case: Case, first: int, load: str | None, save: str | None) -> tuple[State, State]:
    """Loads, trains from step `first` on, and saves.

    Returns:
        Parameters and optimizer state, after loading and at the end.
    """
    model = sharded(case)
    optimizer = optimizer_of(model, case)
    if load is not None:
        stored = _stored(model, optimizer)
        dcp.load(stored, checkpoint_id=load)
        set_state_dict(model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
    loaded = _everything(model, optimizer)
    train(model, optimizer, case, first)
    if save is not None:
        dcp.save(_stored(model, optimizer), checkpoint_id=save)
    return loaded, _everything(model, optimizer)


def _stored(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def _everything(model: nn.Module, optimizer: Optimizer) -> State:
    """Parameters, and the optimizer's state by parameter and key, gathered."""
    state = {
        f"{name}.{key}": (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    return {**whole(model), **state}
