"""Does it help that moments follow the basis, or that factors are rebalanced? The study of docs/moment-transport.md.

python benchmarks/moment_transport.py digits OUT        # about an hour on one core; resumes where it was stopped
python benchmarks/moment_transport.py factorization OUT
python benchmarks/moment_transport.py confirm           # what the first found, on seeds that it did not use
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from sdsopt import AltLoRA, Correction, GramPower, TrackBasis, register_correction
from sdsopt.compare import DigitsTask, Settings, compare
from sdsopt.compare.difference import paired_difference
from sdsopt.compare.grid import Run
from sdsopt.compare.methods import make_inner, make_method
from sdsopt.compare.records import final_loss
from sdsopt.compare.summary import Row
from sdsopt.compare.tasks import FactorizationTask
from sdsopt.compare.train import train

SPLIT = GramPower(0.5, update_exponent=0.5)
SDS = GramPower(0.5)
SCALED = GramPower(1.0)

# By the name of what they add to; that decides on the grid of learning rates.
VARIANTS: dict[str, Callable[[], Correction]] = {
    "sds-split+transport": lambda: TrackBasis(SPLIT),
    "sds-split+balance1": lambda: TrackBasis(SPLIT, carry_moments=False, balance_every=1),
    "sds-split+balance10": lambda: TrackBasis(SPLIT, carry_moments=False, balance_every=10),
    "sds-split+both10": lambda: TrackBasis(SPLIT, balance_every=10),
    "sds+transport": lambda: TrackBasis(SDS),
    "sds+balance10": lambda: TrackBasis(SDS, carry_moments=False, balance_every=10),
    "scaled+transport": lambda: TrackBasis(SCALED),
    "altlora": AltLoRA,
    "altlora+no-projection": lambda: AltLoRA(project_momentum=False),
}


def base_of(method: str) -> str:
    return method.partition("+")[0]


@dataclass(frozen=True)
class Digits(DigitsTask):
    """Each variant starts from the grid of what it adds to."""

    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        return super().learning_rates(inner, base_of(method))


@dataclass(frozen=True)
class Factorization(FactorizationTask):
    """Far enough from the solution that the subspaces turn."""

    distance: float = 0.5

    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        return super().learning_rates(inner, base_of(method))


# (inner, base, its best rate, variant, its best rate), as the sweep found them.
FOUND = [
    ("adamw", "sds", 0.008, "sds+transport", 0.008),
    ("adamw", "sds-split", 0.004, "sds-split+transport", 0.004),
    ("adamw", "sds-split", 0.004, "sds-split+balance10", 0.004),
    ("adamw", "sds-split", 0.004, "sds-split+both10", 0.004),
    ("adamw", "scaled", 0.008, "scaled+transport", 0.008),
    ("sgd", "sds-split", 0.008, "sds-split+balance10", 0.016),
    ("sgd", "scaled", 0.0016, "scaled+transport", 0.0032),
]


def confirm() -> None:
    """A rate that was chosen on five seeds was also lucky on them: these ten chose nothing."""
    task = DigitsTask()
    task.prepare()
    for inner, base, base_lr, variant, lr in FOUND:
        by_method = [
            [
                final_loss(train(task, Run(make_method(method), make_inner(inner), rate, seed, 8, 150), ""))
                for seed in range(5, 15)
            ]
            for method, rate in ((base, base_lr), (variant, lr))
        ]
        before, after = (f"{fmean(losses):.4f} ± {stdev(losses):.3f}" for losses in by_method)
        d = paired_difference(by_method[1], by_method[0])
        assert d is not None
        print(
            f"| {inner} | `{variant}` | {before} | {after} | {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] {d.verdict} |"
        )


def sweep(name: str, out: str) -> None:
    """Prints every method at its best rate, and its difference to what it adds to."""
    task = {"digits": Digits, "factorization": Factorization}[name]()
    settings = Settings(
        corrections=("lora", "sds", "sds-split", "scaled", *VARIANTS),
        full=name == "digits",
        seeds=(0, 1, 2, 3, 4),
    )
    rows = {(row.inner, row.method): row for row in compare(task, settings, out=out).rows}
    print("| inner | method | best LR | final train loss | held out | LR range | minus its base, 95 % | by seed |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for (inner, method), row in rows.items():
        print(f"| {inner} | `{method}` | {_line(row, rows.get((inner, base_of(method))))} |")


def _line(row: Row, base: Row | None) -> str:
    if row.best is None or row.lr_range is None:
        return "diverged"
    edge = f" ({row.at_edge} edge)" if row.at_edge else ""
    loss = f"{row.best.loss.mean:.4g} ± {row.best.loss.std:.2g}"
    accuracy = "–" if row.accuracy is None else f"{100 * row.accuracy.mean:.1f} %"
    open_range = "≥ " if row.range_open else ""
    return " | ".join(
        [f"{row.best.lr:g}{edge}", loss, accuracy, f"{open_range}{row.lr_range:g}×", *_against(row, base)]
    )


def _against(row: Row, base: Row | None) -> tuple[str, str]:
    """Each at its own best learning rate, seed by seed."""
    if base is None or base is row or base.best is None or row.best is None:
        return "–", ""
    losses = [{r.seed: final_loss(r) for r in cell.records} for cell in (row.best, base.best)]
    found = paired_difference(*([by_seed[seed] for seed in sorted(by_seed)] for by_seed in losses))
    if found is None:
        return "–", ""
    seeds = ", ".join(f"{value:+.2g}" for value in found.by_seed)
    return f"{found.mean:+.2g} [{found.low:+.2g}, {found.high:+.2g}], {found.verdict}", seeds


if __name__ == "__main__":
    for name, factory in VARIANTS.items():
        register_correction(name, factory)
    confirm() if sys.argv[1] == "confirm" else sweep(*sys.argv[1:])
