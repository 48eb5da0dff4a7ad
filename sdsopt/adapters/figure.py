"""An adapter's report as a figure: the spectra of ΔW, and the condition numbers of the factors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdsopt.adapters.report import AdapterReport
from sdsopt.adapters.text import common_prefix
from sdsopt.adapters.verdict import LITTLE, MUCH
from sdsopt.extras import extra
from sdsopt.printable import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg", ".pdf")

# Of middle lightness, on a transparent ground: they read on white paper and on a dark page. Okabe and Ito's hues.
_BLUE, _ORANGE, _GREY = "#2b87c8", "#df7a2a", "#7d7d7d"

_MOST_NAMES = 60


def save_figure(report: AdapterReport, path: Path) -> None:
    """Draws the figure, over a file that is there.

    Args:
        report: What to draw.
        path: Where to, with one of `SUFFIXES`.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: The file cannot be written.
    """
    with extra("cli"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    named = len(report.layers) <= _MOST_NAMES
    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
    }
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY)
    # No pyplot: it would choose a window system and keep global state.
    with mpl.rc_context(style):
        height = max(3.6, 1.2 + 0.2 * len(report.layers)) if named else 6.0
        figure = Figure(figsize=(9.0, height), layout="constrained", dpi=150)
        spectra, conditions = figure.subplots(1, 2, width_ratios=(1, 1))
        _spectra(spectra, report)
        _conditions(conditions, report, named=named)
        figure.savefig(path, transparent=True)


def _spectra(panel: Axes, report: AdapterReport) -> None:
    """All blocks' singular values, each relative to its largest; coloured from the first layer to the last."""
    last = max(1, len(report.layers) - 1)
    for index, layer in enumerate(report.layers):
        for values in layer.singular_values:
            if not values[0] > 0:  # zero, or NaN
                continue
            # Below float64's rounding there is no height to draw.
            relative = [value / values[0] if value > 1e-14 * values[0] else math.nan for value in values]
            positions = range(1, len(relative) + 1)
            panel.plot(positions, relative, color=_blend(index / last), linewidth=1.0, alpha=0.7, marker=".")
    panel.set(xlabel="i", ylabel="σᵢ / σmax", yscale="log")
    panel.set_title("spectrum of ΔW, from the first layer (blue) to the last", fontsize=9, loc="left")
    panel.grid(color=_GREY, alpha=0.25, linewidth=0.6)


def _conditions(panel: Axes, report: AdapterReport, *, named: bool) -> None:
    """κ(A) and κ(B), one layer a line, from the top down."""
    rows = range(len(report.layers))
    for label, marker, colour, values in (
        ("κ(A)", "o", _BLUE, [layer.condition_A for layer in report.layers]),
        ("κ(B)", "D", _ORANGE, [layer.condition_B for layer in report.layers]),
    ):
        known = [(value, row) for value, row in zip(values, rows, strict=True) if math.isfinite(value)]
        panel.plot(*(zip(*known, strict=True) if known else ([], [])), marker, color=colour, markersize=4, label=label)
        # Infinity has no place on the axis: an arrow at its end.
        beyond: list[Any] = [row for value, row in zip(values, rows, strict=True) if math.isinf(value)]
        if beyond:
            panel.scatter(
                [1.0] * len(beyond),
                beyond,
                marker=">",
                color=colour,
                transform=panel.get_yaxis_transform(),
                clip_on=False,
            )
    for limit in (LITTLE, MUCH):
        panel.axvline(limit, color=_GREY, linewidth=0.8, linestyle=":")
    names = [layer.name for layer in report.layers]
    prefix = common_prefix(names)
    if named:
        # Nothing in a file's names is a formula or needs another font.
        labels = [name.removeprefix(prefix).encode("ascii", "backslashreplace").decode()[-40:] for name in names]
        panel.set_yticks(list(rows), [printable(label) for label in labels], fontsize=7, parse_math=False)
    else:
        panel.set_ylabel("layer")
    panel.set(xscale="log", xlabel="κ   (▸ infinite; dotted: 3 and 10)")
    panel.set_title("condition numbers", fontsize=9, loc="left")
    panel.set_ylim(max(1, len(names)) - 0.5, -0.5)  # the first on top
    left, right = panel.get_xlim()
    panel.set_xlim(min(left, 0.9), max(right, 2 * MUCH))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.grid(axis="x", color=_GREY, alpha=0.25, linewidth=0.6)
    panel.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, labelcolor=_GREY, fontsize=8)


def _blend(share: float) -> tuple[float, ...]:
    """Returns the colour at this share of the way from blue to orange."""
    ends = [[int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)] for colour in (_BLUE, _ORANGE)]
    return tuple((1 - share) * start + share * end for start, end in zip(*ends, strict=True))
