"""One claim of the paper, and what became of it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPRODUCED = "reproduced"
PARTLY = "partly reproduced"
NOT = "not reproduced here"


@dataclass(frozen=True)
class Claim:
    """A claim with its evidence.

    Attributes:
        name: A short name, also for its figure's file.
        statement: What the paper says.
        findings: What was measured, each a sentence with its number, and whether it is as the paper says.
        remark: How to read it.
        figure: The evidence as a picture.
    """

    name: str
    statement: str
    findings: tuple[tuple[str, bool], ...]
    remark: str
    figure: Figure

    @property
    def verdict(self) -> str:
        """By the findings: all, some or none."""
        held = [holds for _, holds in self.findings]
        return REPRODUCED if all(held) else PARTLY if any(held) else NOT
