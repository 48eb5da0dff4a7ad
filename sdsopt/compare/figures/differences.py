"""How much better than tuned LoRA, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.figures.style import in_section, marker, panels, section_names, section_title, style
from sdsopt.compare.summary import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def has_differences(rows: Sequence[Row]) -> bool:
    """Tells whether there is a baseline to differ from."""
    return any(row.difference is not None for row in rows)


def draw_differences(figure: Figure, rows: Sequence[Row]) -> None:
    """Draws for each method the difference's 95 % interval, its mean, and every seed."""
    names = [names for names in section_names(rows) if has_differences(in_section(rows, *names))]
    most = max(len(in_section(rows, *name)) for name in names)
    [line] = panels(figure, 1, len(names), height=0.4 + 0.45 * most, share="none")
    for panel, (inner, rank) in zip(line, names, strict=True):
        members = [row for row in in_section(rows, inner, rank) if row.difference is not None]
        for height, row in enumerate(reversed(members)):
            found = row.difference
            assert found is not None
            colour = style(rows, row.method)["color"]
            panel.plot([found.low, found.high], [height, height], color=colour, linewidth=3, alpha=0.45)
            panel.plot(found.by_seed, [height] * len(found.by_seed), "|", color=colour, markersize=9)
            panel.plot(found.mean, height, marker=marker(rows, row.method), color=colour)
        panel.axvline(0, color="0.3", linewidth=1)
        panel.set_yticks(range(len(members)), [row.method for row in reversed(members)])
        panel.set_ylim(-0.6, len(members) - 0.4)
        panel.set(title=section_title(rows, inner, rank), xlabel="← better     Δ final train loss to lora     worse →")
