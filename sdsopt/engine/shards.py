"""Pairs that other processes hold a share of: exchanged together, and corrected where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.corrections import Correction, Factors, LearningRates, Lengths, PairTensors, RowMap
from sdsopt.engine.batch import Batch
from sdsopt.engine.job import Job
from sdsopt.engine.presence import Presence
from sdsopt.engine.roots import Part
from sdsopt.sharding import Distribution, add_up, collect, spread

DecayOf = Callable[[Parameter], "float | Tensor"]
RateOf = Callable[[Parameter], "float | Tensor | None"]


@dataclass(eq=False)
class Side:
    """A factor whose gradient takes part in a step.

    Attributes:
        job: The pair.
        letter: "A" or "B".
        parameter: The factor.
        has_gradient: Whether it has one. If not, other processes need the zeros that are its share.
        tensor: Its gradient, and later its update, in a shape to compute with; what the correction makes of it.
        start: What this process stored of the factor before the step; None where it makes none.
    """

    job: Job
    letter: str
    parameter: Parameter
    has_gradient: bool
    tensor: Tensor | None = None
    start: Tensor | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"factor {self.letter} of {self.job.pair.name}"

    @property
    def where(self) -> Distribution:
        """Where the factor lies."""
        return getattr(self.job.where, self.letter)

    @property
    def stored(self) -> Tensor:
        """What this process stores of the factor; a step changes it."""
        return self.where.local(self.parameter.detach())

    @property
    def gradient(self) -> Tensor:
        """What this process stores of the gradient."""
        gradient = self.parameter.grad
        return torch.zeros_like(self.stored) if gradient is None else self.where.local(gradient)


class Shards:
    """The sharded pairs of one step.

    Args:
        jobs: The pairs, with what this process stores of their factors.
        sides: The factors whose gradients take part, with the two of a pair side by side.
        presence: What compares the processes' gradients.
    """

    def __init__(self, jobs: Sequence[Job], sides: Sequence[Side], presence: Presence) -> None:
        self.jobs = jobs
        self._sides = sides
        self._presence = presence
        self._turned = [(side.name, turn.group, side.has_gradient) for side in sides if (turn := side.where.turn)]

    @property
    def corrected_pairs(self) -> int:
        """The number of pairs with a gradient."""
        return len({id(side.job) for side in self._sides if side.has_gradient})

    def exchange(self) -> None:
        """Gives the jobs' factors, and the gradients, shapes to compute with: by one all-to-all, or by gathering."""
        factors = [part for job in self.jobs for part in ((job.where.A, job.A), (job.where.B, job.B))]
        ready = iter(spread([*factors, *((side.where, side.gradient) for side in self._sides)]))
        for job in self.jobs:
            job.A, job.B = next(ready), next(ready)
        for side in self._sides:
            side.tensor = next(ready)

    def words(self, like: Tensor) -> Sequence[Part]:
        """Returns what to add up along with Gram matrices, for `compare`."""
        return self._presence.parts(self._turned, like)

    def add_up_words(self) -> Sequence[Tensor]:
        """Adds these up by themselves, in a step that needs no Gram matrix."""
        if not self.jobs:
            return []
        job = self.jobs[0]
        return add_up(self.words(torch.empty(0, dtype=job.dtype, device=job.A.device)))

    def compare(self, counts: Sequence[Tensor]) -> None:
        """Makes sure that all processes have the same gradients, given the sums of `words`.

        Raises:
            UnequalGradientsError: They have not.
        """
        self._presence.check(self._turned, counts)

    def precondition(self, correction: Correction) -> dict[Tensor, Tensor | None]:
        """Returns the corrected gradients by parameter; None for one that shall not step."""
        self._map(
            correction,
            correction.precondition_rows(),
            lambda job, tensors, before: Batch([job]).precondition(correction, [tensors])[0],
        )
        shares = self._collect()
        corrected: dict[Tensor, Tensor | None] = {}
        for side in self._sides:
            if side.has_gradient:
                share = shares.get(side)
                corrected[side.parameter] = None if share is None else side.where.wrap(share)
        return corrected

    def remember(self, gradients: Mapping[Tensor, Tensor | None]) -> None:
        """Keeps the values of those factors that are to step, and of those that others need a share of."""
        for side in self._sides:
            if not side.has_gradient or gradients[side.parameter] is not None:
                side.start = side.stored.clone()

    def postcondition(self, correction: Correction, decay_of: DecayOf, rate_of: RateOf) -> None:
        """Replaces the step that was taken by the one that the correction makes of it; the decay stays as it is.

        It takes as many collectives as the gradients did.
        """
        moving = [side for side in self._sides if side.start is not None]
        decayed = {side: _decayed(side, decay_of) for side in moving}
        updates = spread([(side.where, side.stored - decayed[side]) for side in moving])
        for side in self._sides:
            side.tensor = None
        for side, update in zip(moving, updates, strict=True):
            side.tensor = update
        rates = {side: rate_of(side.parameter) for side in moving if side.has_gradient}

        def whole(job: Job, tensors: PairTensors, before: PairTensors) -> PairTensors:
            of_job = {side.letter: rate for side, rate in rates.items() if side.job is job}
            both = LearningRates(of_job.get("A"), of_job.get("B"))
            return Batch([job], [before]).postcondition(correction, [tensors], both)[0]

        self._map(correction, correction.postcondition_rows(), whole)
        for side, update in self._collect().items():
            if side.has_gradient:
                side.stored.copy_(decayed[side] + update)

    def _map(
        self,
        correction: Correction,
        rows: RowMap | None,
        whole: Callable[[Job, PairTensors, PairTensors], PairTensors],
    ) -> None:
        """Corrects the tensors of all sides."""
        pairs = {id(job): (job, PairTensors(None, None), PairTensors(None, None)) for job in self.jobs}
        for side in self._sides:
            job, tensors, before = pairs[id(side.job)]
            # What was exchanged is a copy from before the step.
            start = None if side.where.is_exchanged else side.start
            replaced = tensors._replace(**{side.letter: side.tensor}), before._replace(**{side.letter: start})
            pairs[id(job)] = (job, *replaced)
        taking_part = [entry for entry in pairs.values() if entry[1] != PairTensors(None, None)]
        mapped = {id(job): whole(job, tensors, before) for job, tensors, before in taking_part if job.where.are_whole}
        parted = [entry for entry in taking_part if not entry[0].where.are_whole]
        if parted:
            assert rows is not None
            mapped |= _map_rows(parted, rows, correction.keeps_dtype)
        for side in self._sides:
            side.tensor = getattr(mapped[id(side.job)], side.letter) if id(side.job) in mapped else None

    def _collect(self) -> dict[Side, Tensor]:
        """What this process stores of each side's tensor."""
        sides = [side for side in self._sides if side.tensor is not None]
        tensors = collect([(side.where, side.tensor) for side in sides if side.tensor is not None])
        return dict(zip(sides, tensors, strict=True))


def _decayed(side: Side, decay_of: DecayOf) -> Tensor:
    assert side.start is not None
    # An optimizer leaves a parameter without gradient alone.
    return side.start * (1 - decay_of(side.parameter)) if side.has_gradient else side.start


def _map_rows(
    entries: Sequence[tuple[Job, PairTensors, PairTensors]], rows: RowMap, keeps_dtype: bool
) -> dict[int, PairTensors]:
    """Corrects this process's rows; the lengths of all pairs take one all-reduce for each process group."""
    factors = [job.factors(before) for job, _, before in entries]
    blocks = [job.split(tensors) for job, tensors, _ in entries]
    if not keeps_dtype:
        blocks = [pair.map(lambda t, dtype=f.dtype: t.to(dtype)) for f, pair in zip(factors, blocks, strict=True)]
    mapped = [rows.map(*arguments) for arguments in zip(factors, blocks, strict=True)]
    if rows.scale is not None:
        lengths = _lengths([job for job, _, _ in entries], factors, blocks, mapped)
        scales = [rows.scale(of_pair) for of_pair in lengths]
        mapped = [
            pair.map(lambda tensor, scale: tensor * scale.to(tensor.dtype), scale)
            for pair, scale in zip(mapped, scales, strict=True)
        ]
    own = [pair.apart_from(given) for pair, given in zip(mapped, blocks, strict=True)]
    return {id(job): job.join(pair, given) for (job, given, _), pair in zip(entries, own, strict=True)}


def _lengths(
    jobs: Sequence[Job], factors: Sequence[Factors], blocks: Sequence[PairTensors], mapped: Sequence[PairTensors]
) -> list[Lengths]:
    measured = [*(PairTensors(f.stored_A, f.stored_B) for f in factors), *blocks, *mapped]
    parts = [
        (where.sums, torch.linalg.vector_norm(tensor, dim=(-2, -1), keepdim=True, dtype=job.dtype).square())
        for job, pair in zip([*jobs] * 3, measured, strict=True)
        for where, tensor in zip(job.where, pair, strict=True)
        if tensor is not None
    ]
    squares = iter(add_up(parts))
    lengths = [pair.map(lambda _: next(squares).sqrt()) for pair in measured]  # (e, 1, 1)
    k = len(jobs)
    return list(map(Lengths, lengths[:k], lengths[k : 2 * k], lengths[2 * k :]))
