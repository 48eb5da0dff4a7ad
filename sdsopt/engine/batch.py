"""Pairs of one shape, stacked: a correction computes with them as with one pair of more blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdsopt.corrections import Correction, Factors, LearningRates, Memory, PairTensors
from sdsopt.engine.job import Job
from sdsopt.errors import InvalidCorrectionError


class Batch:
    """One job, or several whose factors have the same shapes, dtypes, device, scaling, gradients and kind of memory.

    Args:
        jobs: The jobs.
        before: The values of their factors before a step, where these are not the present ones any more.
    """

    def __init__(self, jobs: Sequence[Job], before: Sequence[PairTensors] | None = None) -> None:
        self._jobs = jobs
        self._before = before

    def precondition(self, correction: Correction, gradients: Sequence[PairTensors]) -> list[PairTensors]:
        """Returns each job's corrected gradients, tensors of their own; None for a factor that shall not step.

        Each job is given its new memory.
        """
        given = self._split(correction, gradients)
        if correction.keeps_memory:
            corrected = self._advance(correction, given)
        else:
            corrected = correction.precondition(self._factors(), given)
        _require_like(given, corrected, correction, "gradients")
        return self._join(corrected.apart_from(given), gradients)

    def postcondition(
        self, correction: Correction, updates: Sequence[PairTensors], rates: LearningRates
    ) -> list[PairTensors]:
        """Returns the steps that the correction makes of each job's."""
        given = self._split(correction, updates)
        mapped = correction.postcondition(self._factors(), given, rates)
        _require_like(given, mapped, correction, "updates")
        return self._join(mapped, updates)

    def _advance(self, correction: Correction, given: PairTensors) -> PairTensors:
        """Corrects with what the jobs remember, and gives each its new memory."""
        A, B = ([getattr(job.memory, letter) for job in self._jobs] for letter in "AB")
        corrected, memory = correction.advance(self._factors(), given, Memory(_stack_by_name(A), _stack_by_name(B)))
        for job, new_A, new_B in zip(self._jobs, self._by_name(memory.A), self._by_name(memory.B), strict=True):
            job.memory = Memory(new_A, new_B)
        return corrected

    def _split(self, correction: Correction, tensors: Sequence[PairTensors]) -> PairTensors:
        """Stacks tensors of the parameters' shapes to (e, r, n) and (e, m, r), in the dtype the correction takes."""
        blocks = [job.split(tensors_of_one) for job, tensors_of_one in zip(self._jobs, tensors, strict=True)]
        stacked = PairTensors(_stack([one.A for one in blocks]), _stack([one.B for one in blocks]))
        return stacked if correction.keeps_dtype else stacked.map(lambda tensor: tensor.to(self._jobs[0].dtype))

    def _join(self, blocks: PairTensors, given: Sequence[PairTensors]) -> list[PairTensors]:
        parts = map(PairTensors, self._parts(blocks.A), self._parts(blocks.B))
        return [job.join(part, like) for job, part, like in zip(self._jobs, parts, given, strict=True)]

    def _factors(self) -> Factors:
        # Not `Job.present`: what is converted for this batch would stay until the end of the step.
        before = self._before or [PairTensors(None, None)] * len(self._jobs)
        first = self._jobs[0]
        if len(self._jobs) == 1:
            return first.factors(before[0])
        A, B = zip(*(job.stored(values) for job, values in zip(self._jobs, before, strict=True)), strict=True)
        return Factors(
            stored_A=torch.cat(A),
            stored_B=torch.cat(B),
            scaling=first.scaling,
            dtype=first.dtype,
            roots_A={p: torch.cat([job.roots_A[p] for job in self._jobs]) for p in first.roots_A},
            roots_B={p: torch.cat([job.roots_B[p] for job in self._jobs]) for p in first.roots_B},
            step=first.step,
        )

    def _by_name(self, stacked: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        parts = {name: self._parts(tensor) for name, tensor in stacked.items()}
        return [
            {name: part for name, of_all in parts.items() if (part := of_all[i]) is not None}
            for i in range(len(self._jobs))
        ]

    def _parts(self, stacked: Tensor | None) -> Sequence[Tensor | None]:
        if stacked is None:
            return [None] * len(self._jobs)
        return [stacked] if len(self._jobs) == 1 else stacked.split(len(stacked) // len(self._jobs))


def _require_like(given: PairTensors, returned: object, correction: Correction, what: str) -> None:
    """Checks what a correction made of tensors, since it may be anybody's."""
    if not isinstance(returned, PairTensors):
        raise InvalidCorrectionError(f"{correction} returned {type(returned).__name__} for its {what}, not PairTensors")
    for letter, one, other in zip("AB", given, returned, strict=True):
        if other is not None and (one is None or one.shape != other.shape):
            wanted = "None, as there is none" if one is None else f"{tuple(one.shape)}, as it was given"
            raise InvalidCorrectionError(
                f"{correction} returned {what} of shape {tuple(other.shape)} for factor {letter}, not {wanted}"
            )


def _stack_by_name(memories: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return memories[0] if len(memories) == 1 else {n: torch.cat([one[n] for one in memories]) for n in memories[0]}


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) <= 1:
        return present[0] if present else None
    return torch.cat(present)
