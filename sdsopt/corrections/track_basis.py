"""What the inner optimizer has gathered follows the bases that its gradients are given in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sdsopt.corrections.base import Factors
from sdsopt.corrections.wrapping import Wrapping
from sdsopt.errors import UnsupportedCorrectionError
from sdsopt.options import require_integer


@final
@dataclass(frozen=True)
class TrackBasis(Wrapping):
    r"""A correction whose moments are carried from step to step, and whose factors are kept balanced.

    The gradient of A that the inner optimizer sees is s·Z_Bᵀ·G with Z_B = B·M_B^(-p). When B moves, so does Z_B, and
    the momentum in A would go on pointing along coordinates that mean something else by now. Carrying replaces it by
    what the same past gradients of W would look like in the new basis, as far as the old one tells:

    $$m_A \leftarrow T\,m_A, \quad v_A \leftarrow (T \circ T)\,v_A, \qquad
    T = M_{B'}^{-p}\,(B'^\top B)\,M_B^{p-1},$$

    which for p = 1/2 is polar(B')ᵀ·polar(B). The squares v are carried as those of uncorrelated coordinates, which is
    all that a diagonal second moment knows. Likewise m_B ← m_B·R and v_B ← v_B·(R∘R), from the right.

    Rebalancing puts A ← T·A and B ← B·T⁻¹ with the symmetric T that makes AAᵀ = BᵀB: the same product, whose
    condition number the two factors then share equally. Its change of basis loses nothing, and moments are always
    carried through it. A pair whose product has a rank below r stays as it is.

    Source: LoRA-RITE (arXiv 2410.20625) and LoFT (arXiv 2505.21289) carry moments, in optimizers of their own: with
    r×r second moments, and in RITE with a compensation for what of them leaves the subspace; a stock optimizer's state
    has no place for either. BaLoRA (arXiv 2605.31484) balances.

    Attributes:
        carry_moments: Whether moments follow every step.
        balance_every: After how many steps the factors are balanced; None for never.

    Raises:
        TypeError: `balance_every` is no integer.
        ValueError: `balance_every` is below 1.
        UnsupportedCorrectionError: The correction inside has no `basis_exponent`.
    """

    carry_moments: bool = True
    balance_every: int | None = None

    def __post_init__(self) -> None:
        if self.balance_every is not None:
            wanted = "a whole number of steps ≥ 1, or None for never"
            require_integer("rebalance_every", self.balance_every, wanted, lambda steps: steps >= 1)
        if self.correction.basis_exponent is None:
            raise UnsupportedCorrectionError(
                f"{self.correction} gives its gradients in no basis B·M_B^(-p) (its basis_exponent is None), so "
                "moments cannot be carried and factors not be rebalanced with it; use one that has it, such as sds, "
                "sds-split or scaled"
            )

    @property
    def carries_moments(self) -> bool:
        return self.carry_moments or self.correction.carries_moments

    @property
    def rebalance_every(self) -> int | None:
        return self.balance_every or self.correction.rebalance_every


def basis_change(old: Factors, new: Factors, exponent: float) -> tuple[Tensor, Tensor]:
    """Returns the matrices that carry moments from the bases of one step to those of the next.

    Args:
        old: The factors that the moments were gathered with, and M^(p-1) among their roots.
        new: The factors now, and M^(-p) among their roots.
        exponent: p.

    Returns:
        T (e, r, r) for A, to be applied from the left, and R (e, r, r) for B, from the right.
    """
    identity = torch.eye(old.A.shape[-2], dtype=old.dtype, device=old.A.device)
    # A root of power 0 is not among the roots.
    T = new.roots_B.get(exponent, identity) @ (new.B.mT @ old.B) @ old.roots_B.get(1 - exponent, identity)
    R = old.roots_A.get(1 - exponent, identity) @ (old.A @ new.A.mT) @ new.roots_A.get(exponent, identity)
    # Exactly, since damping would let moments fade in directions that a resting factor lacks.
    return _where_moved(old.B, new.B, T, identity), _where_moved(old.A, new.A, R, identity)


def _where_moved(old: Tensor, new: Tensor, change: Tensor, identity: Tensor) -> Tensor:
    rests = (old == new).flatten(1).all(1)[:, None, None]  # (e, 1, 1)
    return torch.where(rests, identity, change)
