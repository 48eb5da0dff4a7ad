"""The claims as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from sdsopt.compare.paper.claim import NOT, OUTCOMES, REPRODUCED, Claim, lettered, preamble
from sdsopt.compare.report import figure_html, page

_TITLE = "SDS-LoRA's claims, measured here"
_CLASSES = {REPRODUCED: "better", NOT: "worse"}


def make_paper_report(claims: Sequence[Claim], figures: Mapping[str, bytes]) -> str:
    """Returns the report: a table of verdicts, then each claim with its numbers and its figure (SVG, by name)."""
    rows = "".join(
        f"<tr><td><a href='#{claim.name}'>({letter})</a> {escape(claim.statement)}</td>{_verdict(claim)}</tr>"
        for letter, claim in lettered(claims)
    )
    parts = [
        f"<h1>{_TITLE}</h1>",
        f"<p>{escape(preamble())}</p>",
        f"<p>{OUTCOMES} (paired bootstrap of the mean).</p>",
        f'<div class="wide"><table class="claims">{rows}</table></div>',
    ]
    for letter, claim in lettered(claims):
        lines = "".join(f"<li>{found.outcome.value} {escape(found.text)}</li>" for found in claim.findings)
        parts += [
            f'<section id="{claim.name}">',
            figure_html(f"({letter}) {claim.verdict}: {claim.statement}", figures[claim.name]),
            f'<ul class="findings">{lines}</ul>',
            f"<p>{escape(claim.remark)}</p>",
            "</section>",
        ]
    return page(_TITLE, parts)


def _verdict(claim: Claim) -> str:
    return f'<td class="{_CLASSES.get(claim.verdict, "")}">{claim.verdict} ({claim.count})</td>'
