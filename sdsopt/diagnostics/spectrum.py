"""Singular values in float64, and what stands for them where there are none."""

from __future__ import annotations

import torch
from torch import Tensor

from sdsopt.linalg import accurate_dtype


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


def in_accurate_dtype(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns matrices (..., d, r) in `accurate_dtype` for LAPACK, which raises on NaN, and a mask (...) of the finite.

    Those that are not finite are replaced by zeros.
    """
    finite = matrix.isfinite().flatten(-2).all(-1)  # (...)
    known = torch.where(finite[..., None, None], matrix, torch.zeros_like(matrix))
    return known.to(accurate_dtype(matrix.device)), finite
