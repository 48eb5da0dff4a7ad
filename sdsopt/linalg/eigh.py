"""Inverse roots by eigendecomposition of the Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sdsopt.linalg.base import InverseRoot, RootResult
from sdsopt.linalg.products import gram
from sdsopt.linalg.spectrum import replace_non_finite, roots_from_spectrum


@final
@dataclass(frozen=True)
class EighInverseRoot(InverseRoot):
    """What "auto" takes on a CPU: forms M = XᵀX and decomposes it with `torch.linalg.eigh`.

    Cost: d·r² for the Gram matrix and about 9·r³ for the decomposition. In float64 the root of a matrix with
    cond(X) = κ is exact to about 1e-16·κ², which is below float32 rounding up to κ = 1e4.
    """

    def reduce(self, factor: Tensor) -> Tensor:
        """Forms the Gram matrix XᵀX, (..., d, r) → (..., r, r)."""
        return gram(factor)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        """Decomposes Gram matrices (k, r, r); see `InverseRoot.compute`."""
        matrices, finite = replace_non_finite(reduced)
        eigenvalues, vectors = torch.linalg.eigh(matrices)
        return roots_from_spectrum(vectors, eigenvalues, finite, exponents, damping)
