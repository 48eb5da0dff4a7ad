"""Claim (c): how convergence depends on the condition number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from statistics import median
from typing import TYPE_CHECKING

import torch

from sdsopt.compare.difference import paired_difference
from sdsopt.compare.figures.style import panels, plain_ticks
from sdsopt.compare.paper.claim import Claim, Finding, Outcome, is_above, is_below
from sdsopt.compare.paper.look import LOOK, new_figure
from sdsopt.compare.processes import spread
from sdsopt.compare.tasks import FactorizationTask
from sdsopt.compare.train import reproducible
from sdsopt.optimizer import SDSPreconditioner

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORRECTIONS = ("lora", "sds", "sds-split", "scaled")
CONDITIONS = (1.0, 10.0, 100.0, 1000.0)
RATES = (1.0, 0.5, 0.2, 0.1, 0.05)
LIMIT = 2000
_TOLERANCE = 1e-6
_FLAT = 0.1  # an exponent below it is no dependence

Counts = Sequence[int]  # steps, by condition number


def steps_to_solution(correction: str, condition: float, lr: float, seed: int = 0, limit: int | None = None) -> int:
    """Returns the number of SGD steps to a relative error of 1e-6 in float64; `limit` where that is not reached."""
    limit = LIMIT if limit is None else limit
    task = FactorizationTask(condition=condition, target_rank=5, distance=0.01)
    with reproducible(seed):
        return _steps(task, correction, lr, limit)


def _steps(task: FactorizationTask, correction: str, lr: float, limit: int) -> int:
    model = task.build_model(5).double()
    optimizer = SDSPreconditioner(torch.optim.SGD(model.parameters(), lr=lr), model, correction)
    for step in range(limit):
        error = model()
        relative = (error.norm() / model.get_buffer("target").norm()).item()
        if relative < _TOLERANCE:
            return step
        if not relative < 1e3:
            break
        optimizer.zero_grad()
        (0.5 * error.square().sum()).backward()
        optimizer.step()
    return limit


def convergence_claim(seeds: Sequence[int], jobs: int) -> Claim:
    """Counts the steps for each κ and seed at the best learning rate, and fits steps ~ κ^a seed by seed."""
    cases = list(product(CORRECTIONS, seeds, CONDITIONS))
    found = dict(zip(cases, spread(_fewest_steps, cases, jobs), strict=True))
    steps = {c: [[found[c, seed, kappa] for kappa in CONDITIONS] for seed in seeds] for c in CORRECTIONS}
    return Claim(
        "convergence",
        "LoRA's convergence degrades with the condition number; SDS's does not.",
        (
            _finding("lora", steps["lora"], degrades=True),
            _finding("sds", steps["sds"], degrades=False),
            _finding("sds-split", steps["sds-split"], degrades=False),
        ),
        "SGD to a relative error of 1e-6 on a 60×50 factorization of rank 5 from a start near the solution, each at "
        f"its best of five learning rates; at most {LIMIT} steps. The exponent a of steps ~ κ^a is fitted for each "
        f"seed, with the limit in place of what took longer; a up to {_FLAT} counts as no dependence. scaled takes "
        f"{_shown(steps['scaled'])} steps. Independence of κ belongs to the split form, which maps the step too, and "
        "to scaled; sds on the standard factors still needs about √κ.",
        _figure(steps),
    )


def _fewest_steps(case: tuple[str, int, float]) -> int:
    correction, seed, condition = case
    fewest = LIMIT
    for lr in RATES:  # no rate needs more time than the best one so far
        fewest = steps_to_solution(correction, condition, lr, seed, fewest)
    return fewest


def _finding(correction: str, by_seed: Sequence[Counts], *, degrades: bool) -> Finding:
    exponents = [exponent(counts) for counts in by_seed]
    found = paired_difference(exponents, [0.0] * len(exponents))
    shown = f"{correction}: {_shown(by_seed)} steps at κ = {', '.join(f'{k:g}' for k in CONDITIONS)}"
    if found is None:
        return Finding(f"{shown}; too few seeds that converge to fit an exponent", Outcome.UNDECIDED)
    relation = "≥" if any(counts[-1] >= LIMIT for counts in by_seed) else "="
    text = f"{shown} (median over seeds); a {relation} {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
    return Finding(text, is_above(found, _FLAT) if degrades else is_below(found, _FLAT))


def exponent(counts: Counts) -> float:
    """Returns the slope of log steps over log κ: a lower bound where the limit was reached, infinite if at once."""
    if counts[0] >= LIMIT:
        return math.inf
    points = [(math.log(k), math.log(max(n, 1))) for k, n in zip(CONDITIONS, counts, strict=True)]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def _medians(by_seed: Sequence[Counts]) -> list[float]:
    return [median(counts) for counts in zip(*by_seed, strict=True)]


def _shown(by_seed: Sequence[Counts]) -> str:
    return ", ".join(f"{n:g}" if n < LIMIT else f"> {LIMIT}" for n in _medians(by_seed))


def _figure(steps: Mapping[str, Sequence[Counts]]) -> Figure:
    figure = new_figure()
    [[panel]] = panels(figure, 1, 1)
    for correction, by_seed in steps.items():
        look = LOOK[correction]
        panel.loglog(CONDITIONS, _medians(by_seed), label=correction, **look)
        ranges = list(zip(*by_seed, strict=True))
        low, high = [min(counts) for counts in ranges], [max(counts) for counts in ranges]
        panel.fill_between(CONDITIONS, low, high, color=look["color"], alpha=0.15, linewidth=0)
    panel.axhline(LIMIT, color="0.5", linewidth=1, linestyle=":")
    panel.set(
        xlabel="condition number κ of the solution", ylabel=f"SGD steps to 1e-6 (limit {LIMIT})\nmedian and range"
    )
    plain_ticks(panel.xaxis, panel.yaxis)
    panel.legend(frameon=False)
    return figure
