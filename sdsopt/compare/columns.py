"""What every form of the table says: terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from sdsopt.compare.difference import MIN_SEEDS
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row, Stat

NONE = "–"
HEADINGS = (
    "best LR",
    "train loss",
    "vs\nlora",
    "held-out\nacc. %",
    "gap\nclosed %",
    "LR range\n≤ 10 %",
    "time\n/ step",
)

_VERDICTS = {"better": "better", "worse": "worse", "no difference": "same", "too few seeds": "?"}


class Section(NamedTuple):
    """The rows of one inner optimizer at one rank.

    Attributes:
        title: Names them.
        lines: For each row its method and the texts under `HEADINGS`.
    """

    title: str
    lines: list[tuple[str, tuple[str, ...]]]


def sections(rows: Sequence[Row], times: StepTimes) -> list[Section]:
    """Returns the table's text, section by section."""
    ranks = {row.rank for row in rows}
    return [
        Section(
            inner if len(ranks) == 1 else f"{inner}, rank {rank}",
            [(row.method, _texts(row, times.get((inner, rank, row.method)))) for row in members],
        )
        for (inner, rank), members in groupby(rows, key=lambda row: (row.inner, row.rank))
    ]


def _texts(row: Row, time: float | None) -> tuple[str, ...]:
    elapsed = NONE if time is None else f"{time:.2f}×"
    if row.best is None or row.lr_range is None:
        return NONE, "diverged", NONE, NONE, NONE, NONE, elapsed
    edge = {"low": "↓", "high": "↑", None: " "}[row.at_edge]
    return (
        f"{row.best.lr:.2g} {edge}",
        format_loss(row.best.loss),
        NONE if row.difference is None else _VERDICTS[row.difference.verdict],
        NONE if row.accuracy is None else format_stat(row.accuracy, digits=1, scale=100),
        NONE if row.gap_closed is None else f"{100 * row.gap_closed[0]:.0f} ± {100 * row.gap_closed[1]:.0f}",
        f"{'≥ ' if row.range_open else ''}{row.lr_range:.2g}×",
        elapsed,
    )


def format_loss(stat: Stat) -> str:
    """Returns "mean ± std" with three decimals, or two digits of a loss that these would hide."""
    if stat.mean >= 0.01 or stat.mean == 0:
        return format_stat(stat, digits=3)
    return f"{stat.mean:.2g}" if math.isnan(stat.std) else f"{stat.mean:.2g} ± {stat.std:.1g}"


def format_stat(stat: Stat, digits: int, scale: float = 1.0) -> str:
    """Returns "mean ± std"; the mean alone for a single seed."""
    mean = f"{scale * stat.mean:.{digits}f}"
    return mean if math.isnan(stat.std) else f"{mean} ± {scale * stat.std:.{digits}f}"


def legend(rows: Sequence[Row], times: StepTimes) -> list[str]:
    """Returns the lines that explain the columns, and warn where the rows say less than they seem to."""
    seeds = max((cell.loss.count for row in rows for cell in row.cells), default=0)
    lines = [  # no wider than the table
        f"mean ± std over {seeds} seed{'s' if seeds != 1 else ''} at the LR of lowest train loss (last fifth)",
        "vs lora:    by the 95 % interval of the loss's difference to tuned LoRA",
        f"            (paired bootstrap over seeds); ? with fewer than {MIN_SEEDS} seeds",
        "gap closed: share of the train-loss gap from lora to full, paired by",
        "            seed, ± standard error; – where that gap is within noise",
        "LR range:   highest / lowest LR with a loss within 10 % of the best;",
        "            ≥ where it reaches the end of the grid",
    ]
    if times:
        lines.append("time/step:  median ratio to plain LoRA, side by side")
    if any(row.at_edge for row in rows):
        lines.append("↑ ↓:        the best LR ends its grid; widen it before reading that row")
    if diverged := sum(row.diverged for row in rows):
        lines.append(f"{diverged} run{'s' if diverged != 1 else ''} diverged")
    return lines
