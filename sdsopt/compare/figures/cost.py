"""Quality against the time of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import Draw, in_section, marker, panels, section_title, style
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_cost(times: StepTimes) -> Draw:
    """Returns a figure of final loss over relative step time: down and left is better."""

    def draw(figure: Figure, rows: Sequence[Row]) -> None:
        names = list(dict.fromkeys((inner, rank) for inner, rank, _ in times))
        [line] = panels(figure, 1, len(names))
        for panel, (inner, rank) in zip(line, names, strict=True):
            for row in in_section(rows, inner, rank):
                time = times.get((inner, rank, row.method))
                if row.best is None or time is None:
                    continue
                panel.plot(
                    time,
                    row.best.loss.mean,
                    marker=marker(rows, row.method),
                    color=style(rows, row.method)["color"],
                    linestyle="none",
                    label=row.method,
                )
            panel.set(title=section_title(rows, inner, rank), xlabel="time of a step, relative to lora")
            panel.legend(frameon=False, fontsize=8)
        line[0].set_ylabel("final train loss at the best LR")

    return draw
