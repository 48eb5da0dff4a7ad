"""Condition numbers of the factors over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import draw_band, in_section, panels, plain_ticks, section_names, section_title
from sdsopt.compare.records import Record
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_conditions(rows: Sequence[Row]) -> bool:
    """Tells whether there is anything to draw: full fine-tuning has no factors."""
    return any(any(record.kappa_steps for record in row.best.records) for row in rows if row.best)


def draw_conditions(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws κ(A) and κ(B), medians over pairs: mean over seeds, and the range."""
    names = section_names(rows)
    grid = panels(figure, 2, len(names))
    factors: tuple[tuple[str, Callable[[Record], Sequence[float | None]]], ...] = (
        ("κ(A)", lambda record: record.kappa_A),
        ("κ(B)", lambda record: record.kappa_B),
    )
    for line, (label, kappas_of) in zip(grid, factors, strict=True):
        for panel, (inner, rank) in zip(line, names, strict=True):
            for row in in_section(rows, inner, rank):
                if row.best is None or not row.best.records[0].kappa_steps:
                    continue
                steps = row.best.records[0].kappa_steps
                values = [
                    [k for record in row.best.records if (k := kappas_of(record)[i]) is not None]
                    for i in range(len(steps))
                ]
                draw_band(panel, rows, row.method, steps, values)
            panel.set(title=f"{label}, {section_title(rows, inner, rank)}", yscale="log")
            plain_ticks(panel.yaxis)
        line[0].set_ylabel("condition number\n(median over pairs)")
    for panel in grid[-1]:
        panel.set_xlabel("step")
    grid[0][0].legend(frameon=False, fontsize=8)
