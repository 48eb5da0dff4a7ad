"""Whether the correction has something to undo, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import final

from sdsopt.adapters.text import shown

# The spread √(κ(A)·κ(B)) is what `sds` divides out. Adapters from PEFT's start with tuned AdamW measured 1.6 to 2.7 at
# rank 8, 3 to 9 on a real encoder and 10 at rank 64, and were no better with the correction. Near an ill-conditioned
# solution SGD saves about that factor in steps: 3.3 times at a spread of 3.2, 10 at 10 (examples/ill_conditioned.py).
LITTLE, MUCH = 3.0, 10.0

_CAVEAT = (
    "This is the conditioning of the stored factors, no promise of better results: compare at tuned learning rates."
)


class Level(str, Enum):
    """How much there is to undo."""

    NOTHING = "nothing_measured"
    LITTLE = "little"
    SOME = "some"
    MUCH = "much"


@final
@dataclass(frozen=True)
class Verdict:
    """A judgement of an adapter.

    Attributes:
        level: How much there is to undo.
        spread: The median over the layers of √(κ(A)·κ(B)); 1 is perfect, NaN if nothing was measured.
        balanced_spread: What `spread` would be after `sdsopt rebalance`.
        text: The judgement in words.
    """

    level: Level
    spread: float
    balanced_spread: float
    text: str


def judge(spreads: Sequence[float], balanced_spreads: Sequence[float]) -> Verdict:
    """Judges an adapter by its layers.

    Args:
        spreads: √(κ(A)·κ(B)) of each layer whose ΔW is neither zero nor NaN.
        balanced_spreads: √κ(ΔW) of the same layers.
    """
    if not spreads:
        return Verdict(Level.NOTHING, math.nan, math.nan, "No layer has a ΔW to measure.")
    spread, balanced = median(spreads), median(balanced_spreads)
    level = Level.LITTLE if spread <= LITTLE else Level.SOME if spread <= MUCH else Level.MUCH
    text = _TEXTS[level].format(_factor(spread))
    if balanced < 0.8 * spread and spread > LITTLE:
        text += f" `sdsopt rebalance` would bring that down to {shown(balanced)}, at the same ΔW."
    return Verdict(level, spread, balanced, f"{text} {_CAVEAT}")


def _factor(spread: float) -> str:
    return (
        "without bound, since factors are rank-deficient" if math.isinf(spread) else f"by a factor of {shown(spread)}"
    )


_PASSAGE = "the full gradient reaches A and B with gains that differ"

_TEXTS = {
    Level.LITTLE: f"Little for SDS to undo: {_PASSAGE} {{}}. Adapters like this trained no better with the correction.",
    Level.SOME: f"Something for SDS to undo: {_PASSAGE} {{}}. With tuned AdamW, adapters like this trained no better "
    "with the correction; near an ill-conditioned solution, SGD took about that factor fewer steps.",
    Level.MUCH: f"Much for SDS to undo: {_PASSAGE} {{}}. Near an ill-conditioned solution, SGD with the correction "
    "took about that factor fewer steps (measured up to 10); with AdamW this much has not been measured.",
}
