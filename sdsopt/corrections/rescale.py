"""Grafting: the direction of a correction with the length it had before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sdsopt.corrections.base import Correction, Factors, PairTensors


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
        return gradients.map(_with_norm_of, self.correction.precondition(factors, gradients))

    def postcondition(self, factors: Factors, updates: PairTensors) -> PairTensors:
        """Corrects, then restores each raw update's norm."""
        return updates.map(_with_norm_of, self.correction.postcondition(factors, updates))


def _with_norm_of(raw: Tensor, corrected: Tensor) -> Tensor:
    wanted, actual = (torch.linalg.vector_norm(t, dim=(-2, -1), keepdim=True) for t in (raw, corrected))
    return corrected * torch.where(actual == 0, torch.ones_like(actual), wanted / actual)
