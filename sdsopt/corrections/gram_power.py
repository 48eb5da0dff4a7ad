"""The family M^(-p): plain LoRA, SDS, its split form, and ScaledGD."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor

from sdsopt.corrections.base import Correction, Factors, LearningRates, PairTensors
from sdsopt.corrections.row_map import Lengths, RowMap
from sdsopt.linalg import multiply_left, multiply_right


@final
@dataclass(frozen=True)
class GramPower(Correction):
    r"""gA ← M_B^(-p)·gA and gB ← gB·M_A^(-p), and optionally the same of the update with a power q.

    | name | p | q | what it is |
    |---|---|---|---|
    | `lora` | 0 | 0 | the identity |
    | `sds` | 1/2 | 0 | gA = s·polar(B)ᵀ·G: G passes through orthonormal bases (SDS-LoRA, arXiv 2606.16454) |
    | `sds-split` | 1/2 | 1/2 | also maps the step: the product moves by Q_B·Inner(Q_BᵀG) + Inner(G·Q_Aᵀ)·Q_A |
    | `scaled` | 1 | 0 | ScaledGD / Riemannian (arXiv 2402.02347; Tong et al. 2021) |

    Attributes:
        exponent: p in [0, 1], applied to the gradients.
        update_exponent: q in [0, 1], applied to the step of the inner optimizer, without its decoupled weight decay.
        max_update_ratio: Start policy of the split form. From B = 0 the factor M_B^(-q) is as large as one over the
            learning rate. A factor's mapped step is therefore shortened to at most this share of the Frobenius norm of
            the pair's larger factor. None takes it off.

    Raises:
        ValueError: An exponent is outside [0, 1], or `max_update_ratio` is not positive.
    """

    exponent: float
    update_exponent: float = 0.0
    max_update_ratio: float | None = 0.1

    def __post_init__(self) -> None:
        for name in ("exponent", "update_exponent"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 (no correction) and 1 (ScaledGD), got {value}")
        if self.max_update_ratio is not None and not self.max_update_ratio > 0:
            raise ValueError(f"max_update_ratio must be positive, or None for no limit, got {self.max_update_ratio}")

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """The distinct non-zero powers among p and q."""
        return tuple(sorted({self.exponent, self.update_exponent} - {0}))

    @property
    def uses_updates(self) -> bool:
        """True for the split form, q > 0."""
        return self.update_exponent > 0

    @property
    def linear_per_factor(self) -> bool:
        """True: each gradient is multiplied by a power of the partner's Gram matrix."""
        return True

    @property
    def basis_exponent(self) -> float:
        """The power p."""
        return self.exponent

    @property
    def keeps_dtype(self) -> bool:
        """True: a product with a root converts what it needs, part by part, and rounds once."""
        return True

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Applies the power p to the gradients."""
        return _apply(factors, gradients, self.exponent)

    def precondition_rows(self) -> RowMap:
        """Each row of gB, and each column of gA, is multiplied by an r×r matrix."""
        return RowMap(self.precondition)

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        """Applies the power q to the updates and limits their length."""
        mapped = _apply(factors, updates, self.update_exponent)
        if self.max_update_ratio is None or not self.uses_updates:
            return mapped
        limit = _limit(_norm(factors.stored_A), _norm(factors.stored_B), self.max_update_ratio)
        return mapped.map(lambda update: update.mul_(_share(_norm(update), limit).to(update.dtype)))  # new: q > 0

    def postcondition_rows(self) -> RowMap:
        """As `precondition_rows`; the limit depends on lengths alone."""
        limited = self.max_update_ratio is not None and self.uses_updates
        return RowMap(partial(_apply, exponent=self.update_exponent), self._shares if limited else None)

    def _shares(self, lengths: Lengths) -> PairTensors:
        A, B = lengths.factors
        assert A is not None
        assert B is not None
        assert self.max_update_ratio is not None
        return lengths.mapped.map(partial(_share, limit=_limit(A, B, self.max_update_ratio)))


def _apply(factors: Factors, tensors: PairTensors, exponent: float) -> PairTensors:
    if exponent == 0:
        return tensors
    return PairTensors(
        A=None if tensors.A is None else multiply_left(factors.roots_B[exponent], tensors.A),  # (e, r, n)
        B=None if tensors.B is None else multiply_right(tensors.B, factors.roots_A[exponent]),  # (e, m, r)
    )


def _norm(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dim=(-2, -1), keepdim=True, dtype=dtype)


def _limit(length_A: Tensor, length_B: Tensor, ratio: float) -> Tensor:
    # Measured by the larger factor: a B that starts at zero may still leave it.
    larger = torch.maximum(length_A, length_B)  # (e, 1, 1)
    return torch.where(larger > 0, ratio * larger, torch.inf)


def _share(length: Tensor, limit: Tensor) -> Tensor:
    return torch.where(length > limit, limit / length, torch.ones_like(length))  # (e, 1, 1)
