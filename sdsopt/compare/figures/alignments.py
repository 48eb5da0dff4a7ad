"""How well each method's step follows the gradient of full fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import draw_band, in_section, panels, section_names, section_title
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_alignments(rows: Sequence[Row]) -> bool:
    """Tells whether there is anything to draw: not every layer's full gradient can be captured."""
    return any(record.alignment for row in rows if row.best for record in row.best.records)


def draw_alignments(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws the cosine along each method's own run: mean over seeds, and the range."""
    names = section_names(rows)
    [line] = panels(figure, 1, len(names))
    for panel, (inner, rank) in zip(line, names, strict=True):
        for row in in_section(rows, inner, rank):
            found = [record for record in row.best.records if record.alignment] if row.best else []
            if found:
                # A seed may lack a step at which nothing moved.
                by_seed = [dict(zip(record.alignment_steps, record.alignment, strict=True)) for record in found]
                steps = sorted({step for course in by_seed for step in course})
                draw_band(panel, rows, row.method, steps, [[c[step] for c in by_seed if step in c] for step in steps])
        panel.set(title=section_title(rows, inner, rank), xlabel="step")
    line[0].set_ylabel("cosine of G and the product's move\nby an SGD step (median over layers)")
    line[0].legend(frameon=False, fontsize=8)
