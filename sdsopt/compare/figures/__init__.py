"""The comparison as figures."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdsopt.compare.figures.alignments import draw_alignments, has_alignments
from sdsopt.compare.figures.conditions import draw_conditions, has_conditions
from sdsopt.compare.figures.cost import draw_cost
from sdsopt.compare.figures.differences import draw_differences, has_differences
from sdsopt.compare.figures.losses import draw_losses
from sdsopt.compare.figures.sensitivity import draw_sensitivity
from sdsopt.compare.figures.spectra import draw_spectra, has_spectra
from sdsopt.compare.figures.style import Draw
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row
from sdsopt.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["make_figures", "save_figures", "to_svg"]


def make_figures(rows: Sequence[Row], times: StepTimes, title: str) -> Iterator[tuple[str, Figure]]:
    """Draws the figures that the rows have data for, and yields them by name.

    Args:
        rows: The comparison.
        times: Relative times of a step.
        title: Stands above each.
    """
    with extra("demo"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    drawn: list[tuple[str, Draw]] = [("loss_curves", draw_losses), ("lr_sensitivity", draw_sensitivity)]
    if has_differences(rows):
        drawn.append(("differences", draw_differences))
    if has_conditions(rows):
        drawn.append(("condition_numbers", draw_conditions))
    if has_spectra(rows):
        drawn.append(("spectra", draw_spectra))
    if has_alignments(rows):
        drawn.append(("alignment", draw_alignments))
    if times:
        drawn.append(("cost", draw_cost(times)))
    for name, draw in drawn:
        # No pyplot: it would choose a window system and keep global state.
        with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(layout="constrained", dpi=150)
            draw(figure, rows)
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        yield name, figure


def to_svg(figure: Figure) -> bytes:
    """Returns a figure as SVG; the same records give the same bytes."""
    import matplotlib as mpl

    svg = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "sdsopt"}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()


def save_figures(rows: Sequence[Row], times: StepTimes, directory: Path, title: str) -> list[Path]:
    """Saves the figures as PNG files and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, figure in make_figures(rows, times, title):
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1])
    return paths
