"""The comparison as a Markdown table, for papers, issues and model cards."""

from __future__ import annotations

from collections.abc import Sequence

from sdsopt.compare.columns import HEADINGS, legend, sections
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.summary import Row


def make_markdown(rows: Sequence[Row], times: StepTimes, title: str) -> str:
    """Returns a heading, a table with a line for each method, each difference to plain LoRA, and the legend."""
    lines = [
        f"## {title}",
        "",
        "| " + " | ".join(["inner", "method", *(heading.replace("\n", " ") for heading in HEADINGS)]) + " |",
        "|---|---" + "|---:" * len(HEADINGS) + "|",
    ]
    for section in sections(rows, times):
        lines += [
            f"| {' | '.join([section.title, f'`{method}`', *map(str.strip, texts)])} |"
            for method, texts in section.lines
        ]
    lines += ["", *_differences(rows), "", "```", *legend(rows, times), "```", ""]
    return "\n".join(lines)


def _differences(rows: Sequence[Row]) -> list[str]:
    lines = ["Difference of the final train loss to tuned LoRA, 95 % interval, and seed by seed:", ""]
    for row in rows:
        if row.difference is not None:
            d = row.difference
            seeds = ", ".join(f"{value:+.4f}" for value in d.by_seed)
            lines.append(
                f"- {row.inner}, rank {row.rank}, `{row.method}`: {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}], "
                f"**{d.verdict}** ({seeds})"
            )
    return lines
