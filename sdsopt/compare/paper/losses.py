"""Claim (d): a lower loss, and a smaller gap to full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sdsopt.compare.api import Comparison
from sdsopt.compare.columns import format_loss
from sdsopt.compare.figures.sensitivity import draw_sensitivity
from sdsopt.compare.paper.claim import Claim, Finding, Outcome, is_below
from sdsopt.compare.paper.look import new_figure
from sdsopt.compare.summary import Row

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
        "Training loss of the last fifth of the steps with AdamW. Every method has equally many learning rates (grids "
        "widen until no best rate is an edge) and is taken at its best; the intervals take the choice of that rate as "
        "given. Gap closed: the share of LoRA's gap to full fine-tuning, ± its standard error, where that gap is "
        "beyond noise.",
        _figure(comparisons),
    )


def _finding(task: str, row: Row, rows: Sequence[Row]) -> Finding:
    lora = next(other for other in rows if other.method == "lora")
    if row.difference is None or row.best is None or lora.best is None:
        return Finding(f"{task}, {row.method}: diverged", Outcome.UNDECIDED)
    d = row.difference
    share, error = row.gap_closed or (math.nan, math.nan)
    gap = "" if math.isnan(share) else f"; gap closed {100 * share:.0f} ± {100 * error:.0f} %"
    text = (
        f"{task}, {row.method}: {format_loss(row.best.loss)}, lora {format_loss(lora.best.loss)}; difference "
        f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}], {d.verdict}{gap}"
    )
    return Finding(text, is_below(d))


def _figure(comparisons: Mapping[str, Comparison]) -> Figure:
    figure = new_figure()
    parts = figure.subfigures(1, len(comparisons), squeeze=False)[0]
    for part, (task, comparison) in zip(parts, comparisons.items(), strict=True):
        draw_sensitivity(part, comparison.rows)
        part.axes[0].set_title(task)
    figure.set_size_inches(5.4 * len(comparisons), 4.2)
    return figure
