"""The claims as Markdown, for documentation, issues and model cards."""

from __future__ import annotations

from collections.abc import Sequence

from sdsopt.compare.paper.claim import OUTCOMES, Claim, lettered, preamble


def make_paper_markdown(claims: Sequence[Claim]) -> str:
    """Returns a table of verdicts, then each claim with its figure (a file beside it) and its numbers."""
    lines = [preamble(), "", "| claim | verdict | findings |", "|---|---|---:|"]
    lines += [
        f"| ({letter}) {claim.statement} | **{claim.verdict}** | {claim.count} |" for letter, claim in lettered(claims)
    ]
    lines += ["", f"{OUTCOMES}."]
    for letter, claim in lettered(claims):
        lines += ["", f"## ({letter}) {claim.statement}", "", f"**{claim.verdict}** ({claim.count})", ""]
        lines += [f"- {finding.outcome.value} {finding.text}" for finding in claim.findings]
        lines += ["", f"![{claim.statement}](paper-{claim.name}.svg)", "", claim.remark]
    return "\n".join(lines) + "\n"
