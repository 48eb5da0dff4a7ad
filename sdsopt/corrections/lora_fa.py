"""LoRA-FA: A frozen, and B's gradient the closest to full fine-tuning's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sdsopt.corrections.base import Correction, Factors, PairTensors


@final
@dataclass(frozen=True)
class LoRAFA(Correction):
    r"""gB ← gB·M_A⁻¹/s², which minimises ‖s·gB'·A − G‖_F; A makes no step at all, weight decay included.

    Freeze A yourself (`requires_grad_(False)`) for the memory that the method is about: then the backward pass keeps
    no input of A. This correction does the same training without that.

    Has no `basis_exponent`, so moment transport and rebalancing are refused: A is the basis of B's moments and never
    moves, so there is nothing to carry, and balancing would move it.

    From B = 0 nothing is special, since A is not zero. Homogeneous of degree 1.

    Source: LoRA-FA, arXiv 2308.03303, with the gradient of PEFT's `LoraFAOptimizer`, which this equals around AdamW,
    up to its absolute damping.

    Cost for a pair: half of that of `scaled`.
    """

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """The inverse."""
        return (1.0,)

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Corrects gB, and keeps A from stepping."""
        if gradients.B is None:
            return PairTensors(None, None)
        squared = factors.scaling**2 or 1.0  # at s = 0 the gradient is zero
        return PairTensors(A=None, B=gradients.B @ factors.roots_A[1.0] / squared)  # (e, m, r)
