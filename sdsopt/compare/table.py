"""The comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from sdsopt.compare.columns import HEADINGS, legend, sections
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row
from sdsopt.extras import extra

with extra("demo"):
    from rich import box
    from rich.table import Table


def make_table(rows: Sequence[Row], times: StepTimes, title: str) -> Table:
    """Returns a rich table that fits 80 columns, with one section for each inner optimizer and rank."""
    table = Table(
        title=title,
        title_justify="left",
        caption="\n".join(legend(rows, times)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    table.add_column("", style="bold", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for section in sections(rows, times):
        table.add_row(section.title, style="italic")
        for method, texts in section.lines:
            table.add_row(f"  {method}", *texts)
        table.add_section()
    return table
