"""What a correction remembers lies in the optimizer's state, where every kind of checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sdsopt.corrections import Memory
from sdsopt.engine.job import Job
from sdsopt.pairs import LoRAPair

_PREFIX = "sdsopt_"

State = MutableMapping[Tensor, dict[str, Any]]


def remembered(parameter: Tensor, state: State) -> dict[str, Tensor]:
    """Returns what is remembered of a factor's gradients, by the correction's own names: the state's tensors."""
    # Not state[parameter]: an entry that an optimizer did not make itself is one that it does not fill.
    of_parameter = state.get(parameter, {})
    return {name.removeprefix(_PREFIX): value for name, value in of_parameter.items() if name.startswith(_PREFIX)}


def recall(pair: Job | LoRAPair, state: State) -> Memory:
    """Returns what is remembered of a pair."""
    return Memory(remembered(pair.A, state), remembered(pair.B, state))


def keep(jobs: Iterable[Job], state: State, *, moved: bool) -> None:
    """Puts what is to be remembered into the state. After the optimizer's step, which makes its own entries first.

    Args:
        jobs: The pairs, with their new memories.
        state: The optimizer's state.
        moved: Whether the step was one. If not, only what is missing is made, as zeros.
    """
    for job in jobs:
        for parameter, memory in zip((job.A, job.B), job.memory, strict=True):
            for name, tensor in memory.items():
                if moved:
                    # Loading a state dict rounds to the parameter's dtype, so a resumed run would differ by another.
                    # A copy, since it may be part of a stack.
                    state[parameter][_PREFIX + name] = tensor.to(parameter.dtype, copy=True)
                else:
                    state[parameter].setdefault(_PREFIX + name, torch.zeros_like(tensor, dtype=parameter.dtype))


def carry(parameter: Tensor, state: State, carried: Mapping[str, Tensor]) -> None:
    """Replaces what is remembered of a factor by the same in new bases."""
    for name, tensor in carried.items():
        state[parameter][_PREFIX + name].copy_(tensor)
