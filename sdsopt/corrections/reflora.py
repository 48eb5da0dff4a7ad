"""RefLoRA: the step that plain LoRA would make from balanced factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sdsopt.corrections.base import Correction, Factors, PairTensors
from sdsopt.linalg import SVDInverseRoot


@final
@dataclass(frozen=True)
class RefLoRA(Correction):
    r"""gA ← S⁻¹·gA and gB ← gB·S, with the geometric mean S = M_A⁻¹ # M_B, the positive solution of S·M_A·S = M_B.

    Of all factorizations B·P⁻ᵀ · PᵀA of the same product, those with S = P·Pᵀ have equal Gram matrices. A plain LoRA
    step from there, mapped back, is the step made here. So with SGD the product's step does not depend on the
    factorization.

    A zero factor counts as orthonormal, as for every correction. So from B = 0 the first step is that of `sds`, and
    after it S is about ‖B‖/‖A‖: with SGD, B then grows slowly. The paper's own code begins with 100 steps of plain
    LoRA, or with B ≠ 0. Homogeneous of degree 1.

    Source: RefLoRA, arXiv 2505.18877, as the gradient preconditioner of its own implementation. That gives NaN for
    nearly singular factors. Here both Gram matrices are damped, and in S = M_A^(-1/2)·N^(1/2)·M_A^(-1/2) the matrix
    N = M_A^(1/2)·M_B·M_A^(1/2) is never formed: the SVD of M_B^(1/2)·M_A^(1/2) gives its roots.

    Cost for a pair: that of `sds`, and one r×r SVD.
    """

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """M^(1/2) and M^(-1/2)."""
        return (-0.5, 0.5)

    @property
    def linear_per_factor(self) -> bool:
        """True: S depends on the weights alone."""
        return True

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Multiplies by S⁻¹ and by S."""
        half_A, inverse_half_A = factors.roots_A[-0.5], factors.roots_A[0.5]  # (e, r, r)
        # The Gram matrices are damped already; a second time would not give their mean.
        [root_N, inverse_root_N], _ = SVDInverseRoot().compute(factors.roots_B[-0.5] @ half_A, (-0.5, 0.5), damping=0.0)
        return PairTensors(
            A=None if gradients.A is None else half_A @ inverse_root_N @ half_A @ gradients.A,  # (e, r, n)
            B=None if gradients.B is None else gradients.B @ (inverse_half_A @ root_N @ inverse_half_A),  # (e, m, r)
        )
