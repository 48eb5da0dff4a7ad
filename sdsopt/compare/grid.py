"""What runs: the user's settings, unrolled into runs with equal budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from sdsopt.compare.methods import FULL, Inner, Method, make_inner, make_method
from sdsopt.compare.task import Task
from sdsopt.corrections import Correction


@dataclass(frozen=True)
class Settings:
    """What to compare. Every method gets the same number of learning rates, steps and seeds.

    Attributes:
        corrections: Names or `Correction` instances. "lora" is the baseline of gaps and step times; "sds-paper" is no
            correction, but the paper's own parametrization (`sdsopt.reference`).
        full: Whether to add full fine-tuning.
        inner: Names ("adamw", "sgd") or `Inner` instances.
        lrs: Learning rates for every method alike; None takes each method's own grid from the task.
        widen: How often the grids may be widened where the best rate is an edge; see `widened`. A grid that the user
            names (`lrs`) stays as it is.
        seeds: Each seeds the model's fresh parameters and the order of the data; shared by all methods.
        ranks: Ranks of the adapters, each a comparison of its own.
        steps: Length of every run.

    Raises:
        ValueError: A name is unknown, or a number makes no sense.
    """

    corrections: Sequence[str | Correction] = ("lora", "sds", "sds-split", "scaled")
    full: bool = True
    inner: Sequence[str | Inner] = ("adamw", "sgd")
    lrs: Sequence[float] | None = None
    widen: int = 4
    seeds: Sequence[int] = (0, 1, 2)
    ranks: Sequence[int] = (8,)
    steps: int = 150

    def __post_init__(self) -> None:
        for name, numbers in (("rank", self.ranks), ("steps", (self.steps,))):
            if bad := [number for number in numbers if number < 1]:
                raise ValueError(f"{name} must be at least 1, got {bad[0]}")
        if self.widen < 0:
            raise ValueError(f"widen must be at least 0, got {self.widen}")
        if not self.seeds or not self.inner or not self.ranks:
            raise ValueError("there must be at least one seed, one rank and one inner optimizer")
        bad = [lr for lr in self.lrs or () if not 0 < lr < math.inf]
        if bad or (self.lrs is not None and not self.lrs):
            raise ValueError(f"learning rates must be positive numbers, got {bad or 'none'}")
        for name, members in (("methods", self.methods), ("inner optimizers", self.inners)):
            names = [member.name for member in members]
            if not names or len(set(names)) < len(names):
                raise ValueError(f"{name} must be distinct and at least one, got {', '.join(names) or 'none'}")
        for method in self.methods:
            if self.steps < method.shortest:
                raise ValueError(f"{method.name} needs at least {method.shortest} steps, got {self.steps}")

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The rows of the comparison for each inner optimizer."""
        return ((FULL,) if self.full else ()) + tuple(make_method(correction) for correction in self.corrections)

    @cached_property
    def inners(self) -> tuple[Inner, ...]:
        """The inner optimizers."""
        return tuple(make_inner(inner) for inner in self.inner)


@dataclass(frozen=True)
class Run:
    """One training run: all that its result depends on, besides the task."""

    method: Method
    inner: Inner
    lr: float
    seed: int
    rank: int
    steps: int

    @property
    def key(self) -> tuple[str, str, float, int, int | None, int]:
        """Identifies the run in results on disk. Full fine-tuning is the same at every rank."""
        rank = self.rank if self.method.adapts else None
        return (self.method.identity, self.inner.name, self.lr, self.seed, rank, self.steps)


@dataclass(frozen=True)
class Series:
    """What shares one grid of learning rates: a method with an inner optimizer at a rank."""

    inner: Inner
    rank: int
    method: Method


Grids = Mapping[Series, tuple[float, ...]]


def make_grids(task: Task, settings: Settings) -> Grids:
    """Returns the learning rates of every series.

    Raises:
        ValueError: The task gives methods grids of different lengths, or none.
    """
    grids = {
        Series(inner, rank, method): tuple(sorted(set(settings.lrs or task.learning_rates(inner.name, method.name))))
        for inner in settings.inners
        for rank in dict.fromkeys(settings.ranks)
        for method in settings.methods
    }
    sizes = {len(grid) for grid in grids.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"every method must get equally many learning rates, and at least one; got {sorted(sizes)}")
    return grids


def make_runs(grids: Grids, settings: Settings) -> list[Run]:
    """Unrolls the grids. Seeds vary slowest, so that an interrupted sweep has whole grids to show."""
    return [
        Run(series.method, series.inner, lr, seed, series.rank, settings.steps)
        for seed in dict.fromkeys(settings.seeds)
        for series, grid in grids.items()
        for lr in grid
    ]
