"""An adapter's report as a table for the terminal."""

from __future__ import annotations

from sdsopt.adapters.report import AdapterReport, LayerReport, LayerStatus
from sdsopt.adapters.text import common_prefix, shown
from sdsopt.extras import extra
from sdsopt.printable import printable

with extra("cli"):
    from rich import box
    from rich.table import Table
    from rich.text import Text

_HEADINGS = ("r", "κ(A)", "κ(B)", "σmax", "eff.\nrank", "stable\nrank", "‖A‖/\n‖B‖")


def make_table(report: AdapterReport) -> Table:
    """Returns a rich table that is readable at 80 columns."""
    prefix = common_prefix([layer.name for layer in report.layers])
    table = Table(
        title=Text(f"{printable(prefix)}…" if prefix else ""),
        title_justify="left",
        caption=_legend(report),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    # Folded, not cut: what tells layers apart can be anywhere in their names.
    table.add_column("layer", style="bold", overflow="fold")
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers:
        # As Text: what is in brackets must not be read as rich's markup.
        table.add_row(Text(printable(layer.name.removeprefix(prefix)) or "(model)"), *_cells(layer))
    return table


def _cells(layer: LayerReport) -> tuple[str, ...]:
    rank = str(layer.rank) if layer.num_blocks == 1 else f"{layer.num_blocks}×{layer.rank}"
    if layer.status is LayerStatus.NOT_FINITE:
        return rank, *["NaN"] * (len(_HEADINGS) - 1)
    numbers = (layer.condition_A, layer.condition_B, layer.sigma_max, layer.effective_rank, layer.stable_rank)
    return rank, *map(shown, numbers), shown(layer.balance)


def _legend(report: AdapterReport) -> str:
    lines = [
        "κ: condition number of a factor; 1 is best, ∞ where directions are unused",
        "σmax, eff. and stable rank: of ΔW = s·B·A",
    ]
    if any(layer.num_blocks > 1 for layer in report.layers):
        lines.append("e×r: e products of rank r (experts, groups); medians, σmax the largest")
    return "\n".join(lines)
