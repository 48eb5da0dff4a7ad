"""What the figures share: panels, and one look for each method throughout a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision; markers and dashes say the same again.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("s", "o", "^", "D", "v", "P", "X")
_DASHES = ("--", "-", "-", "-.", ":")  # of another length than the colours, so that no two methods share both

Share = Literal["none", "row"]
Draw = Callable[["Figure", Sequence[Row]], None]


def section_names(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Returns the inner optimizers and ranks, in order."""
    return list(dict.fromkeys((row.inner, row.rank) for row in rows))


def section_title(rows: Sequence[Row], inner: str, rank: int) -> str:
    """Names a section; by its rank only where there are several."""
    return inner if len({row.rank for row in rows}) == 1 else f"{inner}, rank {rank}"


def in_section(rows: Sequence[Row], inner: str, rank: int) -> list[Row]:
    """Returns the rows of a section."""
    return [row for row in rows if (row.inner, row.rank) == (inner, rank)]


def panels(figure: Figure, lines: int, columns: int, *, height: float = 3.2, share: Share = "row") -> list[list[Axes]]:
    """Lays out panels with a light grid. A part of a figure keeps its size."""
    if hasattr(figure, "set_size_inches"):
        figure.set_size_inches(1.0 + 4.6 * columns, 0.8 + height * lines)
    made = figure.subplots(lines, columns, sharey=share, squeeze=False)
    for panel in made.flat:
        panel.grid(True, which="major", color="0.9", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return [list(line) for line in made]


def style(rows: Sequence[Row], method: str) -> dict[str, Any]:
    """Returns a method's colour and dashes."""
    at = _position(rows, method)
    return {"color": _COLOURS[at % len(_COLOURS)], "linestyle": _DASHES[at % len(_DASHES)]}


def marker(rows: Sequence[Row], method: str) -> str:
    """Returns a method's marker."""
    return _MARKERS[_position(rows, method) % len(_MARKERS)]


def band(columns: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Returns minimum, mean and maximum of each column."""
    return [min(c) for c in columns], [sum(c) / len(c) for c in columns], [max(c) for c in columns]


def draw_band(
    panel: Axes, rows: Sequence[Row], method: str, x: Sequence[float], columns: Sequence[Sequence[float]]
) -> None:
    """Draws a method's mean over seeds and their range; where no seed has a value, nothing."""
    shown = [(at, column) for at, column in zip(x, columns, strict=True) if column]
    low, middle, high = band([column for _, column in shown])
    at, look = [at for at, _ in shown], style(rows, method)
    panel.plot(at, middle, marker=marker(rows, method), markersize=3, label=method, **look)
    panel.fill_between(at, low, high, color=look["color"], alpha=0.12, linewidth=0)


def _plain_number(value: float, _position: float) -> str:
    """Formats a tick without powers of ten."""
    return f"{value:g}"


def plain_ticks(*axes: Axis) -> None:
    """Labels logarithmic axes without powers of ten; the fewer ticks between these, the more decades an axis spans."""
    for axis in axes:

        def minor(value: float, _position: float, axis: Axis = axis) -> str:
            low, high = axis.get_view_interval()
            if high < 10 * low or (high < 100 * low and f"{value:e}"[0] in "25"):
                return f"{value:.3g}"
            return ""

        axis.set_major_formatter(_plain_number)
        axis.set_minor_formatter(minor)


def _position(rows: Sequence[Row], method: str) -> int:
    return list(dict.fromkeys(row.method for row in rows)).index(method)
