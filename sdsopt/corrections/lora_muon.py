"""LoRA-Muon: the step of fixed spectral norm that descends most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.linalg import vector_norm

from sdsopt.corrections.base import Correction, Factors, LearningRates, PairTensors
from sdsopt.linalg import polar_factor


@final
@dataclass(frozen=True)
class LoRAMuon(Correction):
    r"""δA ← η/(2|s|)·M_B^(-1/2)·polar(M_B^(-1/2)·δA) and δB ← η/(2|s|)·polar(δB·M_A^(-1/2))·M_A^(-1/2).

    The inner optimizer sees raw gradients, and of its step only the direction counts: with `torch.optim.SGD` that is
    the momentum. Both parts s·B·δA and s·δB·A of the product's step then have the spectral norm η/2, so the learning
    rate η is the length of a step of ΔW, whatever the rank, the scaling and the factors.

    From B = 0: A rests in the first step, since its gradient is zero. In the second it may move by its own length.
    Homogeneous of degree 0: the size of the loss does not count.

    The step is read off the weights, so that their rounding could be taken for a direction. Directions below √damping
    of the strongest are therefore left out, and so is a step below the rounding of its factor, as may be left of weight
    decay where there is no gradient. Keep the factors in float32. Weight decay stays the inner optimizer's, factor by
    factor; the paper's rule for the product corresponds to about half of it. Optimizers that find their learning rate
    themselves (Prodigy, D-Adaptation) report another one than they step with.

    Source: LoRA-Muon, arXiv 2606.12921, algorithm 1; its W = A·Bᵀ has no scaling. Intrinsic Muon (arXiv 2605.09238)
    has the same direction on fixed-rank matrices, up to its constant.

    Cost for a pair: as `sds-split`, 4·(m + n)·r² more, and two r×r eigendecompositions.

    Attributes:
        damping: Relative damping δ ≥ 0 of the polar factors.

    Raises:
        ValueError: `damping` is negative or not a number.
    """

    damping: float = 1e-6

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ValueError(f"damping must be a number ≥ 0, got {self.damping}")

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """The inverse square root."""
        return (0.5,)

    @property
    def uses_updates(self) -> bool:
        """True: it maps the step alone."""
        return True

    @property
    def uses_learning_rates(self) -> bool:
        """True: they are the lengths of the steps."""
        return True

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Leaves the gradients as they are."""
        del factors
        return gradients

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        """Gives both parts of the product's step the spectral norm η/2."""
        s = abs(factors.scaling) or 1.0  # at s = 0 the gradients are zero; the sign is in them
        stored = PairTensors(factors.stored_A, factors.stored_B)
        known = updates.map(_without_rounding, stored)
        step = PairTensors(
            A=None if known.A is None else self._step(known.A.mT, factors.roots_B[0.5], rates.A).mT,  # (e, r, n)
            B=None if known.B is None else self._step(known.B, factors.roots_A[0.5], rates.B),  # (e, m, r)
        )
        return step.map(lambda update: update / s)

    def _step(self, update: Tensor, root: Tensor, rate: float | Tensor | None) -> Tensor:
        assert rate is not None  # optimizers without a learning rate were refused
        return (rate / 2) * polar_factor(update @ root, self.damping) @ root  # (e, d, r)


def _without_rounding(update: Tensor, stored: Tensor) -> Tensor:
    update_length, length = (vector_norm(t.to(update.dtype), dim=(-2, -1), keepdim=True) for t in (update, stored))
    noise = 2 * torch.finfo(stored.dtype).eps * length  # (e, 1, 1)
    return update.masked_fill(update_length <= noise, 0.0)
