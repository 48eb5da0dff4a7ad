"""The comparison as figures: loss curves, sensitivity to the learning rate, condition numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdsopt.compare.records import Record
from sdsopt.compare.summary import Row
from sdsopt.extras import extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision; markers and dashes say the same again.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("s", "o", "^", "D", "v", "P", "X")
_DASHES = ("--", "-", "-", "-.", ":", "-", "-.")


def save_figures(rows: Sequence[Row], directory: Path, title: str) -> list[Path]:
    """Draws the figures that the rows have data for.

    Returns:
        The files, as PNG.
    """
    with extra("demo"):
        import matplotlib as mpl
        from matplotlib.figure import Figure

    drawn: list[tuple[str, Callable[[Figure, Sequence[Row]], None]]] = [
        ("loss_curves", _loss_curves),
        ("lr_sensitivity", _lr_sensitivity),
    ]
    if any(any(record.kappa_steps for record in row.best.records) for row in rows if row.best):
        drawn.append(("condition_numbers", _condition_numbers))

    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for name, draw in drawn:
        # No pyplot: it would choose a window system and keep global state.
        with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
            figure = Figure(layout="constrained", dpi=150)
            draw(figure, rows)
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
            path = directory / f"{name}.png"
            figure.savefig(path)
        paths.append(path)
    return paths


def _loss_curves(figure: Figure, rows: Sequence[Row]) -> None:
    inners = _inners(rows)
    panels = _panels(figure, 1, len(inners))
    for panel, inner in zip(panels[0], inners, strict=True):
        for row in rows:
            if row.inner != inner or row.best is None:
                continue
            curves = [_smooth(record.losses) for record in row.best.records]
            steps = range(len(curves[0]))
            low, middle, high = _band([[curve[i] for curve in curves] for i in steps])
            panel.plot(steps, middle, label=f"{row.method} (LR {row.best.lr:.2g})", **_style(rows, row.method))
            panel.fill_between(steps, low, high, color=_style(rows, row.method)["color"], alpha=0.12, linewidth=0)
        panel.set(title=inner, xlabel="step", yscale="log")
        panel.legend(frameon=False, fontsize=8)
    panels[0][0].set_ylabel("train loss at the best LR\n(running mean; mean and range over seeds)")


def _lr_sensitivity(figure: Figure, rows: Sequence[Row]) -> None:
    inners = _inners(rows)
    panels = _panels(figure, 1, len(inners))
    for panel, inner in zip(panels[0], inners, strict=True):
        members = [row for row in rows if row.inner == inner]
        for row in members:
            cells = [cell for cell in row.cells if math.isfinite(cell.loss.mean)]
            panel.errorbar(
                [cell.lr for cell in cells],
                [cell.loss.mean for cell in cells],
                yerr=[0.0 if math.isnan(cell.loss.std) else cell.loss.std for cell in cells],
                marker=_marker(rows, row.method),
                markersize=5,
                capsize=2,
                label=row.method,
                **_style(rows, row.method),
            )
        panel.set(title=inner, xlabel="learning rate", xscale="log", yscale="log")
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
    panels[0][0].set_ylabel("final train loss (mean ± std)\n× diverged")


def _condition_numbers(figure: Figure, rows: Sequence[Row]) -> None:
    inners = _inners(rows)
    panels = _panels(figure, 2, len(inners))
    factors: tuple[tuple[str, Callable[[Record], Sequence[float | None]]], ...] = (
        ("κ(A)", lambda record: record.kappa_A),
        ("κ(B)", lambda record: record.kappa_B),
    )
    for line, (label, kappas_of) in zip(panels, factors, strict=True):
        for panel, inner in zip(line, inners, strict=True):
            for row in rows:
                if row.inner != inner or row.best is None or not row.best.records[0].kappa_steps:
                    continue
                steps = row.best.records[0].kappa_steps
                values = [
                    [k for record in row.best.records if (k := kappas_of(record)[i]) is not None]
                    for i in range(len(steps))
                ]
                defined = [i for i, found in enumerate(values) if found]
                low, middle, high = _band([values[i] for i in defined])
                shown = [steps[i] for i in defined]
                style = _style(rows, row.method)
                panel.plot(shown, middle, marker=_marker(rows, row.method), markersize=3, label=row.method, **style)
                panel.fill_between(shown, low, high, color=style["color"], alpha=0.12, linewidth=0)
            panel.set(title=f"{label}, {inner}", yscale="log")
            panel.yaxis.set_major_formatter(_plain_numbers)
        line[0].set_ylabel("condition number\n(median over pairs)")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    panels[0][0].legend(frameon=False, fontsize=8)


def _plain_numbers(value: float, _position: float) -> str:
    return f"{value:g}"


def _inners(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.inner for row in rows))


def _panels(figure: Figure, lines: int, columns: int) -> list[list[Axes]]:
    figure.set_size_inches(1.0 + 4.6 * columns, 0.8 + 3.2 * lines)
    panels = figure.subplots(lines, columns, sharey="row", squeeze=False)
    for panel in panels.flat:
        panel.grid(True, which="major", color="0.9", linewidth=0.8)
    return [list(line) for line in panels]


def _style(rows: Sequence[Row], method: str) -> dict[str, Any]:
    at = _position(rows, method)
    return {"color": _COLOURS[at % len(_COLOURS)], "linestyle": _DASHES[at % len(_DASHES)]}


def _marker(rows: Sequence[Row], method: str) -> str:
    return _MARKERS[_position(rows, method) % len(_MARKERS)]


def _position(rows: Sequence[Row], method: str) -> int:
    return list(dict.fromkeys(row.method for row in rows)).index(method)


def _band(columns: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    return [min(c) for c in columns], [sum(c) / len(c) for c in columns], [max(c) for c in columns]


def _smooth(losses: Sequence[float]) -> list[float]:
    """Running mean over a twentieth of the run: single batches are noisy."""
    window = max(1, len(losses) // 20)
    return [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - window + 1) : i + 1])]
