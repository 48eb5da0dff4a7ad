"""How the size of a product is shared out between its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from sdsopt.linalg import accurate_dtype


@torch.no_grad()
def balance(A: Tensor, B: Tensor) -> Tensor:
    """Returns ‖A‖_F / ‖B‖_F, which is 1 for the factors that `sdsopt rebalance` writes.

    Args:
        A: (..., r, n).
        B: (..., m, r).

    Returns:
        (...) in float64; infinite for B = 0, NaN if A = 0 as well or a factor is not finite.
    """
    norms = [
        torch.linalg.matrix_norm(factor.to(accurate_dtype(factor.device))).masked_fill(
            ~factor.isfinite().flatten(-2).all(-1), torch.nan
        )
        for factor in (A, B)
    ]
    return norms[0] / norms[1]
