"""How well a step on the factors follows the gradient of the full matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from sdsopt.linalg import accurate_dtype


@torch.no_grad()
def alignment(full_gradient: Tensor, A: Tensor, B: Tensor, step_A: Tensor | None, step_B: Tensor | None) -> Tensor:
    """Returns the cosine between G and the direction B·δA + δB·A in which a step moves the product, to first order.

    It is 1 where the adapter moves as full fine-tuning with plain gradients would; -1 where it climbs. The direction
    itself, an m×n matrix, is not formed.

    Args:
        full_gradient: G = ∂L/∂W, (m, n).
        A: (r, n).
        B: (m, r).
        step_A: δA (r, n), as a *gradient* (to be subtracted); None for a factor that does not move.
        step_B: δB (m, r), likewise.

    Returns:
        A scalar in float64; NaN where nothing moves, or G is zero or not finite.
    """
    dtype = accurate_dtype(A.device)
    G, a, b = (tensor.to(dtype) for tensor in (full_gradient, A, B))
    da = torch.zeros_like(a) if step_A is None else step_A.to(dtype)
    db = torch.zeros_like(b) if step_B is None else step_B.to(dtype)
    overlap = ((b.mT @ G) * da).sum() + ((G @ a.mT) * db).sum()
    # ‖B·δA + δB·A‖², by r×r matrices.
    square = (
        ((b.mT @ b) * (da @ da.mT)).sum() + ((db.mT @ db) * (a @ a.mT)).sum() + 2 * ((b.mT @ db) * (da @ a.mT)).sum()
    )
    length = torch.linalg.matrix_norm(G) * square.clamp(min=0).sqrt()
    return torch.where(length > 0, overlap / length, torch.nan)
