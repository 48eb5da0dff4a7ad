"""Grafting: the direction of a correction with the length it had before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sdsopt.corrections.base import Factors, LearningRates, PairTensors
from sdsopt.corrections.row_map import Lengths, RowMap
from sdsopt.corrections.wrapping import Wrapping


@final
@dataclass(frozen=True)
class KeepNorm(Wrapping):
    """Gives every corrected gradient, and update, the Frobenius norm that it had uncorrected.

    A learning rate tuned for plain LoRA with SGD then carries over. The norm is kept for each factor and each of
    its blocks on its own. In the split form it keeps the length of the inner optimizer's own step, so the limit of
    the start policy has nothing left to do.

    Source: grafting, Agarwal et al. (arXiv 2002.11803).

    Attributes:
        correction: The correction whose direction is taken.
    """

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Corrects, then restores each raw gradient's norm."""
        return self.correction.precondition(factors, gradients).map(_with_norm_of, gradients)

    def precondition_rows(self) -> RowMap | None:
        """As the correction inside, with the raw length instead of its own."""
        return _restoring(super().precondition_rows())

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        """Corrects, then restores each raw update's norm."""
        return self.correction.postcondition(factors, updates, rates).map(_with_norm_of, updates)

    def postcondition_rows(self) -> RowMap | None:
        """As `precondition_rows`."""
        return _restoring(super().postcondition_rows())


def _with_norm_of(corrected: Tensor, raw: Tensor) -> Tensor:
    wanted, actual = (torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True) for t in (raw, corrected))
    return corrected * _ratio(wanted, actual)


def _ratio(wanted: Tensor, actual: Tensor) -> Tensor:
    return torch.where(actual == 0, torch.ones_like(actual), wanted / actual)


def _restoring(inner: RowMap | None) -> RowMap | None:
    # Whatever scale the correction inside has: the length is restored.
    return None if inner is None else RowMap(inner.map, _ratios)


def _ratios(lengths: Lengths) -> PairTensors:
    return lengths.raw.map(_ratio, lengths.mapped)
