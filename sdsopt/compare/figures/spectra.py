"""Singular values of the factors and of their product after the last step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import draw_band, in_section, panels, plain_ticks, section_names, section_title
from sdsopt.compare.records import Record
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MATRICES: tuple[tuple[str, Callable[[Record], Sequence[float]]], ...] = (
    ("A", lambda record: record.spectrum_A),
    ("B", lambda record: record.spectrum_B),
    ("ΔW = s·B·A", lambda record: record.spectrum_product),
)


def has_spectra(rows: Sequence[Row]) -> bool:
    """Tells whether there is anything to draw: records of earlier versions have no spectra."""
    return any(record.spectrum_A for row in rows if row.best for record in row.best.records)


def draw_spectra(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws the singular values of A, B and ΔW, medians over pairs: mean over seeds, and the range."""
    names = section_names(rows)
    grid = panels(figure, len(_MATRICES), len(names), height=2.6)
    for line, (label, spectrum_of) in zip(grid, _MATRICES, strict=True):
        for panel, (inner, rank) in zip(line, names, strict=True):
            for row in in_section(rows, inner, rank):
                spectra = [found for record in row.best.records if (found := spectrum_of(record))] if row.best else []
                if spectra:
                    positions = range(1, len(spectra[0]) + 1)
                    draw_band(panel, rows, row.method, positions, list(zip(*spectra, strict=True)))
            panel.set(title=f"{label}, {section_title(rows, inner, rank)}", yscale="log")
            panel.locator_params(axis="x", integer=True)
            plain_ticks(panel.yaxis)
        line[0].set_ylabel("singular value\n(median over pairs)")
    for panel in grid[-1]:
        panel.set_xlabel("position, largest first")
    grid[0][0].legend(frameon=False, fontsize=8)
