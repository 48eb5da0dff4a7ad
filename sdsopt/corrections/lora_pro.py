"""LoRA-Pro: the gradients whose product step is closest to full fine-tuning's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sdsopt.corrections.base import Correction, Factors, PairTensors
from sdsopt.linalg import solve_sylvester


@final
@dataclass(frozen=True)
class LoRAPro(Correction):
    r"""gA ← M_B⁻¹·gA/s² + X·A and gB ← (I − P_B)·gB·M_A⁻¹/s² − B·X, with the projector P_B = B·M_B⁻¹·Bᵀ.

    For every X these minimise ‖s·B·gA' + s·gB'·A − G‖_F, how far the product's first-order step is from the full
    gradient: it becomes P_B·G + (I − P_B)·G·P_A. X is chosen so that both stay closest to the raw gradients, which is
    the Sylvester equation M_B·X + X·M_A = −M_B⁻¹·gA·Aᵀ/s².

    With one gradient alone, it is the minimiser for that factor alone: M_B⁻¹·gA/s², or gB·M_A⁻¹/s².

    From B = 0: gA' = 0 and gB' = gB·M_A⁻¹/s², as in the paper's first step. After it gA' is about as large as one over
    σ(B), so an inner optimizer that normalises (AdamW), or a warm-up, is needed. Homogeneous of degree 1.

    Source: LoRA-Pro, arXiv 2407.18242. Its own optimizer applies Adam to the m×n equivalent gradient first, at the
    memory of full fine-tuning; here the inner optimizer follows the correction.

    Cost for a pair: 4·(m + n)·r² more than `scaled`, and two r×r eigendecompositions. No m×n or m×m matrix is formed.
    """

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """The damped Gram matrices themselves, and their inverses."""
        return (-1.0, 1.0)

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Corrects both gradients together, or the one that there is."""
        inverse_A, inverse_B = factors.roots_A[1.0], factors.roots_B[1.0]  # (e, r, r)
        squared = factors.scaling**2 or 1.0  # at s = 0 the gradients are zero
        gA = None if gradients.A is None else inverse_B @ gradients.A / squared  # (e, r, n)
        gB = None if gradients.B is None else gradients.B @ inverse_A / squared  # (e, m, r)
        if gA is None or gB is None:
            return PairTensors(gA, gB)
        A, B = factors.partner_A, factors.partner_B
        X = solve_sylvester(factors.roots_B[-1.0], factors.roots_A[-1.0], -(gA @ A.mT))  # (e, r, r)
        # Associated so that every product goes through r×r: P_B·gB = B·(M_B⁻¹·(Bᵀ·gB)).
        return PairTensors(A=gA + X @ A, B=gB - B @ (inverse_B @ (B.mT @ gB) + X))
