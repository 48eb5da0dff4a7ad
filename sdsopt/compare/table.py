"""The comparison as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row, Stat
from sdsopt.extras import extra

with extra("demo"):
    from rich import box
    from rich.table import Table

_NONE = "–"


def make_table(rows: Sequence[Row], times: StepTimes, title: str) -> Table:
    """Returns a rich table that fits 80 columns, with one section for each inner optimizer."""
    table = Table(
        title=title,
        title_justify="left",
        caption=_legend(rows),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", style="bold", no_wrap=True)
    for heading in ("best LR", "train loss", "held-out\nacc. %", "gap\nclosed %", "LR range\n≤ 10 %", "time\n/ step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for inner, members in groupby(rows, key=lambda row: row.inner):
        table.add_row(inner, style="italic")
        for row in members:
            table.add_row(f"  {row.method}", *_cells(row, times.get((inner, row.method))))
        table.add_section()
    return table


def _cells(row: Row, time: float | None) -> tuple[str, ...]:
    elapsed = _NONE if time is None else f"{time:.2f}×"
    if row.best is None or row.lr_range is None:
        return _NONE, "diverged", _NONE, _NONE, _NONE, elapsed
    edge = {"low": "↓", "high": "↑", None: " "}[row.at_edge]
    return (
        f"{row.best.lr:.2g} {edge}",
        format_stat(row.best.loss, digits=3),
        _NONE if row.accuracy is None else format_stat(row.accuracy, digits=1, scale=100),
        _NONE if row.gap_closed is None else f"{100 * row.gap_closed[0]:.0f} ± {100 * row.gap_closed[1]:.0f}",
        f"{'≥ ' if row.range_open else ''}{row.lr_range:.2g}×",
        elapsed,
    )


def format_stat(stat: Stat, digits: int, scale: float = 1.0) -> str:
    """Returns "mean ± std"; the mean alone for a single seed."""
    mean = f"{scale * stat.mean:.{digits}f}"
    return mean if math.isnan(stat.std) else f"{mean} ± {scale * stat.std:.{digits}f}"


def _legend(rows: Sequence[Row]) -> str:
    seeds = max((cell.loss.count for row in rows for cell in row.cells), default=0)
    lines = [  # no wider than the table
        f"mean ± std over {seeds} seed{'s' if seeds != 1 else ''} at the LR of lowest train loss (last fifth)",
        "gap closed: share of the train-loss gap from lora to full, paired by",
        "            seed, ± standard error; – where that gap is within noise",
        "LR range:   highest / lowest LR with a loss within 10 % of the best;",
        "            ≥ where it reaches the end of the grid",
        "time/step:  median ratio to plain LoRA, side by side",
    ]
    if any(row.at_edge for row in rows):
        lines.append("↑ ↓:        the best LR ends its grid; widen it before reading that row")
    if diverged := sum(row.diverged for row in rows):
        lines.append(f"{diverged} run{'s' if diverged != 1 else ''} diverged")
    if seeds < 3:
        lines.append("fewer than 3 seeds: do not draw conclusions")
    return "\n".join(lines)
