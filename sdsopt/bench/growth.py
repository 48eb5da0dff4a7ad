"""How the cost grows with the number of pairs, the rank and the width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sdsopt.bench.settings import Settings
from sdsopt.bench.shapes import square_layers
from sdsopt.bench.table import measure
from sdsopt.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAIRS, _RANK, _WIDTH = 16, 16, 2048
# Of what, its values, and (pairs, rank, width) at a value.
_AXES: tuple[tuple[str, tuple[int, ...], Callable[[int], tuple[int, int, int]]], ...] = (
    ("pairs", (4, 16, 64, 256), lambda x: (x, _RANK, 1024)),
    ("rank", (4, 8, 16, 32, 64, 128, 256), lambda x: (_PAIRS, x, _WIDTH)),
    ("width", (512, 1024, 2048, 4096, 8192, 16384), lambda x: (_PAIRS, _RANK, x)),
)
_SHOWN: tuple[str, ...] = ("sds", "sds-split", "scaled")


@dataclass(frozen=True)
class Curve:
    """The time of a correction along one axis.

    Attributes:
        axis: "pairs", "rank" or "width".
        correction: Its name.
        values: Along the axis.
        seconds: The correction's time at each value.
        exponent: The slope of log(seconds) over log(values), by least squares over the upper half of the values,
            where fixed costs no longer count.
    """

    axis: str
    correction: str
    values: tuple[int, ...]
    seconds: tuple[float, ...]
    exponent: float


def measure_growth(settings: Settings, on_start: Callable[[str], object]) -> list[Curve]:
    """Measures square layers in float32, one number varied at a time."""
    settings = replace(settings, peers=False, memory=4.0)
    curves: list[Curve] = []
    for axis, values, point in _AXES:
        times: dict[str, list[float]] = {name: [] for name in _SHOWN}
        for value in values:
            on_start(f"growth with {axis}: {value}")
            pairs, rank, width = point(value)
            section = measure(square_layers(pairs, width), rank, "float32", settings)
            for timing in section.timings:
                if timing.name in times:
                    times[timing.name].append(max(timing.correction, 1e-6))
        for name, seconds in times.items():
            curves.append(Curve(axis, name, values, tuple(seconds), fitted_exponent(values, seconds)))
    return curves


def fitted_exponent(values: Sequence[float], seconds: Sequence[float]) -> float:
    """Returns the slope of a line through the upper half of the points in logarithmic axes."""
    half = (len(values) - 1) // 2
    x, y = ([math.log(v) for v in sequence[half:]] for sequence in (values, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def save_figure(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Draws one panel for each axis, with the fitted exponents in the legends."""
    with extra("cli"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=150)
        _draw(figure, curves)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.savefig(path)


def _draw(figure: Figure, curves: Sequence[Curve]) -> None:
    axes = list(dict.fromkeys(curve.axis for curve in curves))
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    # Okabe and Ito's palette; the markers say the same again.
    styles = dict(zip(_SHOWN, (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "D")), strict=True))
    for panel, axis in zip(panels, axes, strict=True):
        for curve in curves:
            if curve.axis == axis:
                colour, marker = styles[curve.correction]
                label = f"{curve.correction}: exponent {curve.exponent:.2f}"
                milliseconds = [1e3 * seconds for seconds in curve.seconds]
                panel.loglog(curve.values, milliseconds, color=colour, marker=marker, markersize=4, label=label)
        panel.set_xlabel(axis)
        panel.grid(True, which="major", color="0.9", linewidth=0.8)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("correction, ms")
