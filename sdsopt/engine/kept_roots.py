"""Roots that serve for several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.engine.job import Job
from sdsopt.pairs import LoRAPair
from sdsopt.sharding import has_several_processes

_Look = tuple[object, ...]


class _Kept(NamedTuple):
    """A pair's roots, and what its parameters looked like after the last step."""

    roots_A: dict[float, Tensor]
    roots_B: dict[float, Tensor]
    parameters: list[Parameter]  # so that no other one can have the address of one of these
    looks: list[_Look]


class KeptRoots:
    """The roots of each pair, computed anew in every step whose number is a multiple of `update_every`.

    A run that is saved at such a step and resumed goes on bit for bit, as nothing needs to be saved. Otherwise the
    roots are computed at once, and then at the next multiple.

    In one process, roots are not used any more once something else than the optimizer's step has changed a parameter
    of the pair. That cannot be told where it writes through ``.data``, nor inside `torch.compile`; and it is not looked
    for where there are several processes, since all must compute roots in the same steps. There, and everywhere,
    `forget` does it.

    A copy or a pickle of it is empty.

    Args:
        update_every: The number of steps, at least 1. With 1 nothing is kept.
    """

    def __init__(self, update_every: int) -> None:
        self._update_every = update_every
        self._of: dict[LoRAPair, _Kept] = {}
        self._step = -1

    def forget(self) -> None:
        """Makes the next step compute all roots."""
        self._of.clear()

    def lacking(self, jobs: Sequence[Job], step: int) -> list[Job]:
        """Gives the jobs the roots that are kept, and returns those of which none are.

        Args:
            jobs: The pairs of this step.
            step: How many steps were taken before. If it is not the last one's number or the next, another run was
                loaded.
        """
        if step % self._update_every == 0 or step not in (self._step, self._step + 1):
            self.forget()
        self._step = step
        without: list[Job] = []
        for job in jobs:
            kept = self._of.get(job.pair)
            if kept is None or kept.looks != [_look(parameter) for parameter in _parameters(job)]:
                without.append(job)
            else:
                job.roots_A.update(kept.roots_A)
                job.roots_B.update(kept.roots_B)
        return without

    def keep(self, jobs: Sequence[Job]) -> None:
        """Keeps the jobs' roots. After the step, so that its own change of the factors is known."""
        if self._update_every == 1:
            return
        for job in jobs:
            parameters = _parameters(job)
            self._of[job.pair] = _Kept(job.roots_A, job.roots_B, parameters, [_look(p) for p in parameters])

    def __reduce__(self) -> tuple[type[KeptRoots], tuple[int]]:
        return KeptRoots, (self._update_every,)


def _parameters(job: Job) -> list[Parameter]:
    """What the pair's roots depend on."""
    pair = job.pair
    return [parameter for parameter in (pair.A, pair.B, pair.E) if parameter is not None]


def _look(parameter: Parameter) -> _Look:
    same_for_all = id(parameter), parameter.shape, parameter.device
    if torch.compiler.is_compiling() or has_several_processes() or type(parameter) is not Parameter:
        return same_for_all
    version = None if parameter.is_inference() else parameter._version
    return *same_for_all, parameter.data_ptr(), version
