"""Roots that serve for several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdsopt.engine.job import Job
from sdsopt.engine.places import HERE
from sdsopt.pairs import LoRAPair

_Seen = tuple[object, ...]


class _Kept(NamedTuple):
    """A pair's roots, and what its factors looked like after the last step."""

    roots_A: dict[float, Tensor]
    roots_B: dict[float, Tensor]
    factors: _Seen


class KeptRoots:
    """The roots of each pair, computed anew in every step whose number is a multiple of `update_every`.

    A run that is saved at such a step and resumed goes on bit for bit, as nothing needs to be saved. Otherwise the
    roots are computed at once, and then at the next multiple.

    Roots are not used any more once anything but the optimizer's step has changed a factor, such as loading a
    checkpoint. A copy or a pickle of it is empty.

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
            if kept is None or kept.factors != _seen(job):
                without.append(job)
            else:
                job.roots_A.update(kept.roots_A)
                job.roots_B.update(kept.roots_B)
        return without

    def keep(self, jobs: Sequence[Job]) -> None:
        """Keeps the jobs' roots. After the step, so that its own change of the factors is known."""
        if self._update_every > 1:
            self._of.update({job.pair: _Kept(job.roots_A, job.roots_B, _seen(job)) for job in jobs})

    def __reduce__(self) -> tuple[type[KeptRoots], tuple[int]]:
        return KeptRoots, (self._update_every,)


def _seen(job: Job) -> _Seen:
    parameters = [parameter for parameter in (job.pair.A, job.pair.B, job.pair.E) if parameter is not None]
    # Processes must agree on it where they compute the roots together, and their parts of a factor may differ in this.
    has_versions = job.where is HERE and not torch.compiler.is_compiling()
    return tuple((id(p), p.device, p._version if has_versions else None) for p in parameters)
