"""Claims (a) and (b): what the correction does to the gradients of a LoRA run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from sdsopt.compare.difference import paired_difference
from sdsopt.compare.figures.style import panels
from sdsopt.compare.grid import Run
from sdsopt.compare.methods import LORA, make_inner
from sdsopt.compare.paper.claim import Claim, Finding, Outcome, is_above
from sdsopt.compare.paper.look import LOOK, new_figure
from sdsopt.compare.processes import spread
from sdsopt.compare.task import Task
from sdsopt.compare.train import train
from sdsopt.recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CORRECTIONS = ("sds", "sds-split", "scaled")
_POINTS = 10  # measurements in a run

Course = list[tuple[int, dict[str, float]]]  # (step, medians over the pairs by name)


def record_gradients(task: Task, lr: float, seeds: Sequence[int], rank: int, steps: int, jobs: int) -> list[Course]:
    """Trains plain LoRA with AdamW once for each seed, and measures every correction on the same gradients."""
    runs = [Run(LORA, make_inner("adamw"), lr, seed, rank, steps) for seed in seeds]
    return spread(partial(_course, task), runs, jobs)


def _course(task: Task, run: Run) -> Course:
    every = max(1, run.steps // _POINTS)
    recorders: list[Recorder] = []

    def watch(model: nn.Module, optimizer: Optimizer) -> Recorder:
        recorders.append(Recorder(model, optimizer, CORRECTIONS, every=every, full_gradients="*"))
        return recorders[0]

    train(task, run, "", watch)
    return [(measured.step, measured.scalars()) for measured in recorders[0].history]


def effective_rank_claim(courses: Mapping[str, list[Course]]) -> Claim:
    """(a): LoRA lowers the effective rank of the factors' gradients, SDS raises it."""
    findings = [
        _finding(f"{task}, g{factor}: effective rank", found, f"sds/effective_rank_{factor}", "lora")
        for task, found in courses.items()
        for factor in "AB"
    ]
    names = [("A", "effective_rank_A", "effective rank of gA"), ("B", "effective_rank_B", "effective rank of gB")]
    return Claim(
        "effective-rank",
        "LoRA's anisotropic scaling lowers the effective rank of the factors' gradients; SDS raises it.",
        tuple(findings),
        "Both are taken of the same gradients along a plain LoRA run with AdamW at its best rate, as medians over all "
        "pairs. sds takes the scaling away and nothing else, so its rank above lora's is both halves of the claim.",
        _figure(courses, [(name, label, ("lora", "sds", "scaled")) for _, name, label in names]),
    )


def alignment_claim(courses: Mapping[str, list[Course]]) -> Claim:
    """(b): SDS's step follows the full gradient better."""
    findings = [
        _finding(f"{task}, {correction}: cosine", found, f"{correction}/alignment", "lora")
        for task, found in courses.items()
        for correction in ("sds", "sds-split")
    ]
    return Claim(
        "alignment",
        "The product's step under SDS is better aligned with the gradient of full fine-tuning.",
        tuple(findings),
        "The cosine between G and the direction in which one SGD step on the factors would move their product, along "
        "the same run; AdamW's own step is another. sds on the standard factors corrects the gradient alone; the "
        "paper's parametrization moves as sds-split does, and in this so does scaled.",
        _figure(courses, [("alignment", "cosine with the full gradient", ("lora", "sds", "sds-split", "scaled"))]),
    )


def _finding(what: str, courses: list[Course], name: str, baseline: str) -> Finding:
    other = f"{baseline}/{name.partition('/')[2]}"
    # The first measurement is that of B = 0, where half of the gradients are zero.
    ours = [fmean(scalars[name] for _, scalars in course[1:]) for course in courses]
    theirs = [fmean(scalars[other] for _, scalars in course[1:]) for course in courses]
    found = paired_difference(ours, theirs)
    if found is None:
        return Finding(f"{what}: too few seeds to tell", Outcome.UNDECIDED)
    text = (
        f"{what} {fmean(theirs):.3g} with lora, {fmean(ours):.3g} corrected; difference {found.mean:+.3g} "
        f"[{found.low:+.3g}, {found.high:+.3g}]"
    )
    return Finding(text, is_above(found))


def _figure(courses: Mapping[str, list[Course]], lines: Sequence[tuple[str, str, tuple[str, ...]]]) -> Figure:
    figure = new_figure()
    grid = panels(figure, len(lines), len(courses), height=2.8, share="none")  # tasks differ far more than methods do
    for line, (name, label, corrections) in zip(grid, lines, strict=True):
        for panel, (task, found) in zip(line, courses.items(), strict=True):
            steps = [step for step, _ in found[0]][1:]
            for correction in corrections:
                column = _column(found, f"{correction}/{name}")
                panel.plot(steps, [fmean(c) for c in column], label=correction, markersize=4, **LOOK[correction])
                low, high = [min(c) for c in column], [max(c) for c in column]
                panel.fill_between(steps, low, high, color=LOOK[correction]["color"], alpha=0.15, linewidth=0)
            panel.set(title=task, xlabel="step")
        line[0].set_ylabel(f"{label}\n(mean and range over seeds)")
    grid[0][0].legend(frameon=False, fontsize=8)
    return figure


def _column(courses: list[Course], name: str) -> list[list[float]]:
    """Returns the seeds' values at each measurement but the first."""
    by_seed = [[scalars[name] for _, scalars in course[1:]] for course in courses]
    return [list(values) for values in zip(*by_seed, strict=True)]
