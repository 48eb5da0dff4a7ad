"""Does it help that moments follow the basis, or that factors are rebalanced? The study of docs/moment-transport.md.

python benchmarks/moment_transport.py digits OUT        # about an hour on one core; resumes where it was stopped
python benchmarks/moment_transport.py factorization OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdsopt import AltLoRA, Correction, GramPower, TrackBasis, register_correction
from sdsopt.compare import DigitsTask, Settings, compare
from sdsopt.compare.difference import paired_difference
from sdsopt.compare.records import final_loss
from sdsopt.compare.summary import Row
from sdsopt.compare.tasks import FactorizationTask

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
    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        return super().learning_rates(inner, base_of(method))


@dataclass(frozen=True)
class Factorization(FactorizationTask):
    """Far enough from the solution that the subspaces turn."""

    distance: float = 0.5

    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        return super().learning_rates(inner, base_of(method))


def main(name: str, out: str) -> None:
    for variant, factory in VARIANTS.items():
        register_correction(variant, factory)
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
    main(*sys.argv[1:])
