"""The singular value decomposition of B·A without ever forming it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdsopt.diagnostics.spectrum import in_accurate_dtype, singular_values


class ProductSVD(NamedTuple):
    """B·A = U · diag(S) · Vh[:k], with k = min(m, r, n).

    Attributes:
        U: (..., m, k), orthonormal columns.
        S: (..., k), largest first.
        Vh: (..., min(r, n), n), orthonormal rows. Those after the k-th complete the basis; ΔW does not use them.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


@torch.no_grad()
def product_svd(A: Tensor, B: Tensor) -> ProductSVD:
    """Decomposes B·A by QR of both factors and an SVD of the r×r matrix between them.

    Cost: about 4·(m + n)·r² and 20·r³, and memory for the factors alone. σ is exact to about 1e-16·σmax(A)·σmax(B).

    Args:
        A: (..., r, n), any floating dtype.
        B: (..., m, r).

    Returns:
        The decomposition in float64 (float32 on a device without it); NaN throughout where a factor is not finite, or
        the product is out of range.
    """
    basis_A, basis_B, core, unknown = _reduce(A, B)
    left, values, right = torch.linalg.svd(core, full_matrices=True)
    return ProductSVD(
        (basis_B @ left[..., : values.shape[-1]]).masked_fill(unknown[..., None, None], torch.nan),
        values.masked_fill(unknown[..., None], torch.nan),
        (right @ basis_A.mT).masked_fill(unknown[..., None, None], torch.nan),
    )


class PairSpectra(NamedTuple):
    """Singular values, largest first.

    Attributes:
        A: Of A, (..., min(r, n)).
        B: Of B, (..., min(m, r)).
        product: Of B·A, (..., min(m, r, n)).
    """

    A: Tensor
    B: Tensor
    product: Tensor


@torch.no_grad()
def pair_spectra(A: Tensor, B: Tensor) -> PairSpectra:
    """Computes the singular values of both factors and of their product, with one QR of each, and without bases.

    Args:
        A: (..., r, n), any floating dtype.
        B: (..., m, r).

    Returns:
        They, in float64 (float32 on a device without it); NaN where a factor is not finite.
    """
    known_A, finite_A = in_accurate_dtype(A)
    known_B, finite_B = in_accurate_dtype(B)
    triangle_A = torch.linalg.qr(known_A.mT, mode="r").R
    triangle_B = torch.linalg.qr(known_B, mode="r").R
    return PairSpectra(
        singular_values(triangle_A).masked_fill(~finite_A[..., None], torch.nan),
        singular_values(triangle_B).masked_fill(~finite_B[..., None], torch.nan),
        singular_values(triangle_B @ triangle_A.mT).masked_fill(~(finite_A & finite_B)[..., None], torch.nan),
    )


@torch.no_grad()
def product_norm(A: Tensor, B: Tensor) -> Tensor:
    """Returns ‖B·A‖_F, (...), as exact as `product_svd`: also where the product is a small difference of large ones."""
    _, _, core, unknown = _reduce(A, B)
    return torch.linalg.matrix_norm(core).masked_fill(unknown, torch.nan)


def _reduce(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns bases of Aᵀ and B, the matrix between them (..., min(m, r), min(r, n)), and where that is unknown."""
    known_A, finite_A = in_accurate_dtype(A)
    known_B, finite_B = in_accurate_dtype(B)
    basis_A, triangle_A = torch.linalg.qr(known_A.mT)
    basis_B, triangle_B = torch.linalg.qr(known_B)
    core, in_range = in_accurate_dtype(triangle_B @ triangle_A.mT)
    return basis_A, basis_B, core, ~(finite_A & finite_B & in_range)
