"""The change of coordinates after which the two factors of a product are balanced."""

from __future__ import annotations

import torch
from torch import Tensor


def balancing_transform(wide: Tensor, tall: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the symmetric positive T with which T·X and Y·T⁻¹ have one Gram matrix: T·XXᵀ·T = T⁻¹·YᵀY·T⁻¹.

    T² is the geometric mean of (XXᵀ)⁻¹ and YᵀY. So T is the identity where the factors are balanced already, and
    changes smoothly with them; a balance by SVD would also turn the coordinates, with signs and an order of its own.
    Both factors then have the root of Y·X's condition number. No Gram matrix is formed, so it is not squared.

    Args:
        wide: X (k, r, n).
        tall: Y (k, m, r).

    Returns:
        T and T⁻¹, (k, r, r). The identity where the rank of Y·X is below r to working precision, or where a factor is
        not finite: nothing balances these.
    """
    rank = wide.shape[-2]
    identity = torch.eye(rank, dtype=wide.dtype, device=wide.device).expand(len(wide), rank, rank)
    if rank > min(wide.shape[-1], tall.shape[-2]):
        return identity, identity
    finite = (wide.isfinite().flatten(1).all(1) & tall.isfinite().flatten(1).all(1))[:, None, None]  # LAPACK raises
    wide, tall = (torch.where(finite, factor, torch.zeros_like(factor)) for factor in (wide, tall))
    L, R = torch.linalg.qr(wide.mT, mode="r").R.mT, torch.linalg.qr(tall, mode="r").R  # X = L·Q, Y = Q·R
    _, values, right = torch.linalg.svd(R @ L)  # of Y·X
    # Below a hundred times rounding, a singular value is noise.
    regular = values[:, -1:] > 100 * rank * torch.finfo(values.dtype).eps * values[:, :1]
    regular = regular[:, :, None]

    # √S·Vᵀ·L⁻¹ balances too, for S·Vᵀ of the product; T is its symmetric part in the polar decomposition.
    invertible, turned = torch.where(regular, L, identity), values.sqrt()[:, :, None] * right
    any_balance = torch.linalg.solve_triangular(invertible, turned, upper=False, left=False)
    _, scales, vectors = torch.linalg.svd(any_balance)
    scales = torch.where(regular[:, 0], scales, torch.ones_like(scales))[:, :, None]
    T, T_inverse = vectors.mT @ (scales * vectors), vectors.mT @ (vectors / scales)
    return torch.where(regular, T, identity), torch.where(regular, T_inverse, identity)
