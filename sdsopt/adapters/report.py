"""What `inspect_adapter` finds, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, final

from sdsopt.adapters.verdict import Verdict, judge
from sdsopt.pairs import Skipped


class LayerStatus(str, Enum):
    """Whether a layer's numbers mean anything."""

    OK = "ok"
    """Everything is defined."""
    RANK_DEFICIENT = "rank_deficient"
    """A factor uses fewer directions than it has, so that its condition number is infinite."""
    ZERO = "zero"
    """ΔW = 0, mostly since B = 0: not trained yet."""
    NOT_FINITE = "not_finite"
    """A factor holds NaN or infinity: nothing else is known."""


@final
@dataclass(frozen=True)
class LayerReport:
    """The measurements of one layer: with several blocks (experts), medians over those that are not zero.

    A number is NaN where it is not defined, and a condition number infinite for a rank-deficient factor.

    Attributes:
        name: The layer's name in the file.
        status: Whether the numbers mean anything.
        rank: The rank r of each block.
        num_blocks: The number of independent products; 1 but for stacked experts and grouped convolutions.
        scaling: The factor in front of B·A.
        condition_A: κ(A); for AdaLoRA that of diag(E)·A.
        condition_B: κ(B); for AdaLoRA that of B·diag(E).
        condition_delta: κ(ΔW).
        sigma_max: The largest singular value of ΔW, over all blocks.
        effective_rank: Effective rank of ΔW (Roy & Vetterli): the exponential of its spectrum's entropy.
        stable_rank: Stable rank of ΔW: ‖ΔW‖_F² / σmax².
        balance: ‖A‖_F / ‖B‖_F.
        singular_values: Those of ΔW, largest first, for each block.
    """

    name: str
    status: LayerStatus
    rank: int
    num_blocks: int
    scaling: float
    condition_A: float
    condition_B: float
    condition_delta: float
    sigma_max: float
    effective_rank: float
    stable_rank: float
    balance: float
    singular_values: list[list[float]]

    @property
    def spread(self) -> float:
        """√(κ(A)·κ(B)): by which factor the gains of G's directions differ on their way to the factors."""
        return math.sqrt(self.condition_A * self.condition_B)

    @property
    def balanced_spread(self) -> float:
        """√κ(ΔW): what `spread` would be for balanced factors of the same ΔW."""
        return math.sqrt(self.condition_delta)

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes for `json.dumps`; None stands for what is not a finite number."""
        return {
            "name": self.name,
            "status": self.status.value,
            "rank": self.rank,
            "blocks": self.num_blocks,
            "scaling": finite(self.scaling),
            "condition_A": finite(self.condition_A),
            "condition_B": finite(self.condition_B),
            "condition_delta": finite(self.condition_delta),
            "sigma_max": finite(self.sigma_max),
            "effective_rank": finite(self.effective_rank),
            "stable_rank": finite(self.stable_rank),
            "balance": finite(self.balance),
            "singular_values": [[finite(value) for value in values] for values in self.singular_values],
        }


@final
@dataclass(frozen=True)
class AdapterReport:
    """What `inspect_adapter` returns.

    Attributes:
        path: The folder or file, without links.
        layers: The LoRA layers, in natural order of their names.
        skipped: What is no product B·A, and why.
        notes: What had to be assumed.
    """

    path: Path
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the correction has something to undo in these layers."""
        measured = [layer for layer in self.layers if layer.status in (LayerStatus.OK, LayerStatus.RANK_DEFICIENT)]
        return judge([layer.spread for layer in measured], [layer.balanced_spread for layer in measured])

    def count(self, status: LayerStatus) -> int:
        """Returns the number of layers with this status."""
        return sum(layer.status is status for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Returns everything for `json.dumps`; None stands for what is not a finite number."""
        verdict = self.verdict
        return {
            "path": str(self.path),
            "layers": [layer.to_json() for layer in self.layers],
            "skipped": [{"name": item.name, "reason": item.reason} for item in self.skipped],
            "notes": list(self.notes),
            "summary": {
                "level": verdict.level.value,
                "spread": finite(verdict.spread),
                "balanced_spread": finite(verdict.balanced_spread),
                "text": verdict.text,
            },
        }


def finite(value: float) -> float | None:
    """Returns the value, or None for NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
