"""Singular values in float64, and what stands for them where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from sdsopt.linalg import accurate_dtype, gram, symmetric_eigenvalues


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Computes the singular values of each matrix of a batch.

    Args:
        matrix: (..., d, r), any floating dtype.

    Returns:
        (..., min(d, r)), largest first, in float64 (float32 on a device without it); NaN for a matrix that holds NaN
        or infinity.
    """
    known, finite = in_accurate_dtype(matrix)
    return torch.linalg.svdvals(known).masked_fill(~finite[..., None], torch.nan)


@torch.no_grad()
def gram_singular_values(matrix: Tensor) -> Tensor:
    """Computes the singular values of each tall matrix of a batch by way of its Gram matrix, several times as fast.

    What is below 1e-8 of the largest (3e-4 on a device without float64) is rounding: good for ranks, which such values
    do not change, and not for condition numbers.

    Args:
        matrix: (..., d, r), any floating dtype.

    Returns:
        (..., min(d, r)), largest first, as `singular_values` does.
    """
    grams = gram(matrix)  # (..., r, r)
    values = symmetric_eigenvalues(grams[None].flatten(0, -3)).clamp(min=0).sqrt().flip(-1)  # (k, r)
    return values.view(grams.shape[:-1])[..., : min(matrix.shape[-2:])]


def in_accurate_dtype(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns matrices (..., d, r) in `accurate_dtype` for LAPACK, which raises on NaN, and a mask (...) of the finite.

    Those that are not finite are replaced by zeros.
    """
    finite = matrix.isfinite().flatten(-2).all(-1)  # (...)
    known = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    return known.to(accurate_dtype(matrix.device)), finite
