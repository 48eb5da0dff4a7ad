"""All pairs of one step: exchanged between processes, and corrected together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.corrections import Factors, Lengths, PairTensors, RowMap
from sdsopt.engine.job import Job, compute_roots
from sdsopt.engine.presence import Presence
from sdsopt.engine.recipe import Recipe
from sdsopt.sharding import Distribution, add_up, collect, spread

Correct = Callable[[Factors, PairTensors], PairTensors]
DecayOf = Callable[[Parameter], "float | Tensor"]
Parts = Sequence[tuple[Distribution, Tensor]]


@dataclass(eq=False)
class Side:
    """A factor whose gradient takes part in a step.

    Attributes:
        job: The pair.
        letter: "A" or "B".
        parameter: The factor.
        has_gradient: Whether it has one. If not, other processes need the zeros that are its share.
        start: What this process stored of it before the step, where the correction maps updates.
    """

    job: Job
    letter: str
    parameter: Parameter
    has_gradient: bool
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
        """What this process stores of its gradient."""
        gradient = self.parameter.grad
        return torch.zeros_like(self.stored) if gradient is None else self.where.local(gradient)


class Batch:
    """The pairs of one step.

    Args:
        jobs: The pairs, with what this process stores of their factors.
        sides: The factors whose gradients take part, with the two of a pair side by side.
        recipe: The correction and how it is computed.
    """

    def __init__(self, jobs: Sequence[Job], sides: Sequence[Side], recipe: Recipe) -> None:
        self.jobs = jobs
        self.sides = sides
        self.recipe = recipe

    def precondition(self, presence: Presence) -> dict[Parameter, Tensor]:
        """Returns the corrected gradients.

        Sharded factors take one all-reduce for each process group, and those that are cut across their rank one
        all-to-all each way.

        Raises:
            UnequalGradientsError: Another process has a gradient that is missing here, or the other way round.
        """
        gradients = self._exchange()
        turned = [(side.name, turn.group, side.has_gradient) for side in self.sides if (turn := side.where.turn)]
        presence.check(turned, compute_roots(self.jobs, self.recipe, lambda like: presence.parts(turned, like)))
        correction = self.recipe.correction
        rows = correction.precondition_rows()
        corrected: dict[Parameter, Tensor] = {}
        for sides in self._units():
            mapped = _map(sides, [gradients[side] for side in sides], correction.precondition, rows)
            local = collect([(side.where, tensor) for side, tensor in zip(sides, mapped, strict=True)])
            for side, gradient in zip(sides, local, strict=True):
                if side.has_gradient:
                    corrected[side.parameter] = side.where.wrap(gradient)
        return corrected

    def remember(self) -> None:
        """Keeps the factors as they are now, for `postcondition`."""
        for side in self.sides:
            side.start = side.stored.clone()

    def postcondition(self, decay_of: DecayOf) -> None:
        """Replaces the step that was taken by the one that the correction makes of it; the decay stays as it is.

        Sharded factors take as many collectives as in `precondition`.
        """
        correction = self.recipe.correction
        rows = correction.postcondition_rows()
        for sides in self._units():
            decayed = [_decayed(side, decay_of) for side in sides]
            updates = [(side.where, side.stored - rest) for side, rest in zip(sides, decayed, strict=True)]
            mapped = _map(sides, spread(updates), correction.postcondition, rows)
            local = collect([(side.where, tensor) for side, tensor in zip(sides, mapped, strict=True)])
            for side, rest, update in zip(sides, decayed, local, strict=True):
                side.stored.copy_(rest + update)

    def _exchange(self) -> dict[Side, Tensor]:
        """Puts factors into the jobs, and returns gradients, in shapes to compute with."""
        factors = [part for job in self.jobs for part in ((job.where.A, job.A), (job.where.B, job.B))]
        ready = iter(spread([*factors, *((side.where, side.gradient) for side in self.sides)]))
        for job in self.jobs:
            job.A, job.B = next(ready), next(ready)
        return {side: next(ready) for side in self.sides}

    def _units(self) -> list[list[Side]]:
        """What is corrected at a time: each whole pair alone, for the memory, and all sharded ones in one exchange."""
        whole: dict[int, list[Side]] = {}
        sharded: list[Side] = []
        for side in self.sides:
            if side.job.where.are_local:
                whole.setdefault(id(side.job), []).append(side)
            else:
                sharded.append(side)
        return [*whole.values(), sharded] if sharded else list(whole.values())


def _decayed(side: Side, decay_of: DecayOf) -> Tensor:
    assert side.start is not None
    # An optimizer leaves a parameter without gradient alone.
    return side.start * (1 - decay_of(side.parameter)) if side.has_gradient else side.start


def _map(sides: Sequence[Side], tensors: Sequence[Tensor], correct: Correct, rows: RowMap | None) -> list[Tensor]:
    """Corrects gradients or updates, in shapes to compute with, and returns them in the same."""
    jobs = list({id(side.job): side.job for side in sides}.values())
    pairs = {id(job): dict[str, Tensor]() for job in jobs}
    befores = {id(job): dict[str, Tensor]() for job in jobs}
    for side, tensor in zip(sides, tensors, strict=True):
        pairs[id(side.job)][side.letter] = tensor
        # What was exchanged is a copy from before the step.
        if side.start is not None and not side.where.is_exchanged:
            befores[id(side.job)][side.letter] = side.start
    blocks = [job.split(_pair(pairs[id(job)])) for job in jobs]
    factors = [job.factors(_pair(befores[id(job)])) for job in jobs]
    if all(job.where.are_local for job in jobs):
        corrected = [correct(*arguments) for arguments in zip(factors, blocks, strict=True)]
    else:
        assert rows is not None
        corrected = _map_rows(jobs, factors, blocks, rows)
    joined = {id(job): job.join(pair) for job, pair in zip(jobs, corrected, strict=True)}
    return [getattr(joined[id(side.job)], side.letter) for side in sides]


def _pair(tensors: dict[str, Tensor]) -> PairTensors:
    return PairTensors(tensors.get("A"), tensors.get("B"))


def _map_rows(
    jobs: Sequence[Job], factors: Sequence[Factors], blocks: Sequence[PairTensors], rows: RowMap
) -> list[PairTensors]:
    """Corrects this process's rows; the lengths of all pairs take one all-reduce for each process group."""
    mapped = [rows.map(*arguments) for arguments in zip(factors, blocks, strict=True)]
    if rows.scale is None:
        return mapped
    measured = [*(PairTensors(f.A, f.B) for f in factors), *blocks, *mapped]
    parts = [
        (where.sums, tensor.square().sum((-2, -1), keepdim=True))
        for job, pair in zip([*jobs] * 3, measured, strict=True)
        for where, tensor in zip(job.where, pair, strict=True)
        if tensor is not None
    ]
    squares = iter(add_up(parts))
    lengths = [pair.map(lambda _: next(squares).sqrt()) for pair in measured]  # (e, 1, 1)
    k = len(jobs)
    of_jobs = map(Lengths, lengths[:k], lengths[k : 2 * k], lengths[2 * k :])
    return [pair.map(torch.mul, rows.scale(of_job)) for pair, of_job in zip(mapped, of_jobs, strict=True)]
