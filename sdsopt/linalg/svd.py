"""Inverse roots by singular value decomposition of the factor itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdsopt.linalg.base import InverseRoot, RootResult
from sdsopt.linalg.precision import accurate_dtype
from sdsopt.linalg.spectrum import replace_non_finite, roots_from_spectrum


@final
@dataclass(frozen=True)
class SVDInverseRoot(InverseRoot):
    """The most accurate method: never forms the Gram matrix, so κ(X) is not squared.

    X is first reduced by QR to its r×r triangular factor, whose singular values and right singular vectors are
    those of X. Cost: about 2·d·r² for the QR and 20·r³ for the decomposition.
    """

    @property
    def adds_up(self) -> bool:
        """False: the triangular factors of row blocks are factorized again."""
        return False

    def reduce(self, factor: Tensor) -> Tensor:
        """Reduces X to the triangular factor of its QR decomposition, (..., d, r) → (..., r, r)."""
        factor = factor.to(accurate_dtype(factor.device))
        # LAPACK leaves QR of NaN undefined, so such factors are decomposed as zero and marked afterwards.
        finite = factor.isfinite().flatten(-2).all(-1)[..., None, None]
        triangular = torch.linalg.qr(torch.where(finite, factor, torch.zeros_like(factor)), mode="r").R
        missing_rows = factor.shape[-1] - triangular.shape[-2]  # a factor wider than long: d < r
        return pad(triangular, (0, 0, 0, missing_rows)).masked_fill(~finite, torch.nan)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        """Decomposes triangular factors (k, r, r); see `InverseRoot.compute`."""
        triangular, finite = replace_non_finite(reduced)
        _, singular_values, vectors_transposed = torch.linalg.svd(triangular)
        rounding = torch.finfo(singular_values.dtype).eps ** 2  # of their squares
        return roots_from_spectrum(
            vectors_transposed.mT, singular_values.square(), finite, exponents, damping, rounding
        )
