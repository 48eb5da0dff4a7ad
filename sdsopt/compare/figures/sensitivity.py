"""Final loss over the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import in_section, marker, panels, plain_ticks, section_names, section_title, style
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_sensitivity(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws mean and standard deviation over seeds; a rate at which a seed diverged is a cross at the top."""
    names = section_names(rows)
    [line] = panels(figure, 1, len(names))
    for panel, (inner, rank) in zip(line, names, strict=True):
        members = in_section(rows, inner, rank)
        for row in members:
            cells = [cell for cell in row.cells if math.isfinite(cell.loss.mean)]
            panel.errorbar(
                [cell.lr for cell in cells],
                [cell.loss.mean for cell in cells],
                yerr=[0.0 if math.isnan(cell.loss.std) else cell.loss.std for cell in cells],
                marker=marker(rows, row.method),
                markersize=5,
                capsize=2,
                label=row.method,
                **style(rows, row.method),
            )
        panel.set(title=section_title(rows, inner, rank), xlabel="learning rate", xscale="log", yscale="log")
        plain_ticks(panel.xaxis, panel.yaxis)
        # A run that diverged has no height: crosses along the top edge, at its rate.
        for row in members:
            rates = [cell.lr for cell in row.cells if not math.isfinite(cell.loss.mean)]
            if rates:  # a blended transform without points has no extent, and breaks the layout
                panel.scatter(
                    rates,
                    [1.0] * len(rates),
                    marker="x",
                    color="black",
                    transform=panel.get_xaxis_transform(),
                    clip_on=False,
                )
        panel.legend(frameon=False, fontsize=8)
    line[0].set_ylabel("final train loss (mean ± std)" + ("\n× diverged" if any(row.diverged for row in rows) else ""))
