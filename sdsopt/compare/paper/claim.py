"""One claim of the paper, and what became of it here."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch

from sdsopt._version import __version__
from sdsopt.compare.difference import MIN_SEEDS, Difference

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPRODUCED = "reproduced"
PARTLY = "partly reproduced"
NOT = "not reproduced here"


class Outcome(Enum):
    """What a measurement says of a claim; the value is the mark that it is shown with."""

    AS_CLAIMED = "✓"
    UNDECIDED = "–"
    OPPOSITE = "✗"


OUTCOMES = "✓ as claimed, – no difference beyond noise, ✗ the opposite: by the 95 % interval over seeds, in brackets"


def is_above(found: Difference | None, threshold: float = 0.0) -> Outcome:
    """Decides by the 95 % interval over seeds whether a mean lies above a threshold, as is claimed."""
    if found is None or len(found.by_seed) < MIN_SEEDS:
        return Outcome.UNDECIDED
    if found.low > threshold:
        return Outcome.AS_CLAIMED
    return Outcome.OPPOSITE if found.high < threshold else Outcome.UNDECIDED


def is_below(found: Difference | None, threshold: float = 0.0) -> Outcome:
    """As `is_above`, where the claim is that the mean lies below."""
    turned = {Outcome.AS_CLAIMED: Outcome.OPPOSITE, Outcome.OPPOSITE: Outcome.AS_CLAIMED}
    outcome = is_above(found, threshold)
    return turned.get(outcome, outcome)


@dataclass(frozen=True)
class Finding:
    """One measurement.

    Attributes:
        text: What was measured, with its number and the interval of it.
        outcome: Whether that is as the paper says.
    """

    text: str
    outcome: Outcome


@dataclass(frozen=True)
class Claim:
    """A claim with its evidence.

    Attributes:
        name: A short name, also for its figure's file.
        statement: What the paper says.
        findings: What was measured.
        remark: How to read it.
        figure: The evidence as a picture.
    """

    name: str
    statement: str
    findings: tuple[Finding, ...]
    remark: str
    figure: Figure

    @property
    def verdict(self) -> str:
        """By the findings: all, some or none as claimed."""
        held = [finding.outcome is Outcome.AS_CLAIMED for finding in self.findings]
        return REPRODUCED if all(held) else PARTLY if any(held) else NOT

    @property
    def count(self) -> str:
        """How many findings the verdict rests on."""
        held = sum(finding.outcome is Outcome.AS_CLAIMED for finding in self.findings)
        return f"{held} of {len(self.findings)}"


def lettered(claims: Sequence[Claim]) -> Iterator[tuple[str, Claim]]:
    """Yields the claims with the letters that they go by."""
    return zip("abcdefgh", claims, strict=False)


def preamble() -> str:
    """Says what the claims are of, where they were measured, and how far that carries."""
    return (
        f"Source: SDS-LoRA, arXiv 2606.16454. Measured by sdsopt {__version__} with torch {torch.__version__}, Python "
        f"{platform.python_version()} and {platform.machine()}, on models small enough for two cores: a claim that is "
        "not reproduced here may still hold at the paper's scale, and the other way round."
    )
