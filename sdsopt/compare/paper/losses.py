"""Claim (d): a lower loss, and a smaller gap to full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.api import Comparison
from sdsopt.compare.columns import format_loss
from sdsopt.compare.figures.sensitivity import draw_sensitivity
from sdsopt.compare.paper.claim import Claim
from sdsopt.compare.summary import Row
from sdsopt.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OURS = ("sds", "sds-split")


def loss_claim(comparisons: Mapping[str, Comparison]) -> Claim:
    """Compares every method at its own best learning rate, seed by seed."""
    findings = [
        _finding(task, row, comparison.rows)
        for task, comparison in comparisons.items()
        for row in comparison.rows
        if row.method in _OURS
    ]
    return Claim(
        "losses",
        "SDS reaches a lower loss than LoRA, and a smaller gap to full fine-tuning, on language and on vision.",
        tuple(findings),
        "AdamW, every method with equally many learning rates (grids widen until no best rate is an edge), at its best "
        "by the training loss of the last fifth of the steps.",
        _figure(comparisons),
    )


def _finding(task: str, row: Row, rows: Sequence[Row]) -> tuple[str, bool]:
    lora = next(other for other in rows if other.method == "lora")
    if row.difference is None or row.best is None or lora.best is None:
        return f"{task}, {row.method}: diverged", False
    d = row.difference
    share, error = row.gap_closed or (math.nan, math.nan)
    gap = "" if math.isnan(share) else f"; gap closed {100 * share:.0f} ± {100 * error:.0f} %"
    text = (
        f"{task}, {row.method}: {format_loss(row.best.loss)}, lora {format_loss(lora.best.loss)}; difference "
        f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}], {d.verdict}{gap}"
    )
    return text, d.verdict == "better"


def _figure(comparisons: Mapping[str, Comparison]) -> Figure:
    with extra("demo"):
        from matplotlib.figure import Figure
    figure = Figure(layout="constrained", dpi=150)
    parts = figure.subfigures(1, len(comparisons), squeeze=False)[0]
    for part, (task, comparison) in zip(parts, comparisons.items(), strict=True):
        draw_sensitivity(part, comparison.rows)
        part.suptitle(task)
    figure.set_size_inches(5.4 * len(comparisons), 4.2)
    return figure
