"""Grafting: the direction of a correction with the length it had before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from sdsopt.corrections.base import Correction, Factors, PairTensors
from sdsopt.corrections.row_map import Lengths, RowMap


@final
@dataclass(frozen=True)
class KeepNorm(Correction):
    """Gives every corrected gradient, and update, the Frobenius norm that it had uncorrected.

    A learning rate tuned for plain LoRA with SGD then carries over. The norm is kept for each factor and each of
    its blocks on its own. In the split form it keeps the length of the inner optimizer's own step, so the limit of
    the start policy has nothing left to do.

    Source: grafting, Agarwal et al. (arXiv 2002.11803).

    Attributes:
        correction: The correction whose direction is taken.
    """

    correction: Correction

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """Those of the inner correction."""
        return self.correction.gram_exponents

    @property
    def uses_updates(self) -> bool:
        """As the inner correction."""
        return self.correction.uses_updates

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Corrects, then restores each raw gradient's norm."""
        return RowMap(self.correction.precondition, _restore)(factors, gradients)

    def precondition_rows(self) -> RowMap | None:
        """As the inner correction, with the raw length instead of its own scale."""
        return _restoring(self.correction.precondition_rows())

    def postcondition(self, factors: Factors, updates: PairTensors) -> PairTensors:
        """Corrects, then restores each raw update's norm."""
        return RowMap(self.correction.postcondition, _restore)(factors, updates)

    def postcondition_rows(self) -> RowMap | None:
        """As `precondition_rows`."""
        return _restoring(self.correction.postcondition_rows())


def _restoring(inner: RowMap | None) -> RowMap | None:
    # The length is restored whatever scale the inner correction would have given it.
    return None if inner is None else RowMap(inner.map, _restore)


def _restore(lengths: Lengths) -> PairTensors:
    return lengths.raw.map(
        lambda wanted, actual: torch.where(actual == 0, torch.ones_like(actual), wanted / actual), lengths.mapped
    )
