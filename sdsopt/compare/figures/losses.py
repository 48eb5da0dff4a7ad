"""Training loss over the steps, at each method's best learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import band, in_section, panels, plain_ticks, section_names, section_title, style
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_losses(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws the mean over seeds, and the range."""
    names = section_names(rows)
    [line] = panels(figure, 1, len(names))
    for panel, (inner, rank) in zip(line, names, strict=True):
        for row in in_section(rows, inner, rank):
            if row.best is None:
                continue
            curves = [_smooth(record.losses) for record in row.best.records]
            steps = range(len(curves[0]))
            low, middle, high = band([[curve[i] for curve in curves] for i in steps])
            look = style(rows, row.method)
            panel.plot(steps, middle, label=f"{row.method} (LR {row.best.lr:.2g})", **look)
            panel.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)
        panel.set(title=section_title(rows, inner, rank), xlabel="step", yscale="log")
        plain_ticks(panel.yaxis)
        panel.legend(frameon=False, fontsize=8)
    line[0].set_ylabel("train loss at the best LR\n(running mean; mean and range over seeds)")


def _smooth(losses: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the run: single batches are noisy."""
    window = max(1, len(losses) // 20)
    return [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - window + 1) : i + 1])]
