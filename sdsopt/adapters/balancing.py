"""The same product in balanced factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdsopt.diagnostics import product_norm, product_svd


class Balanced(NamedTuple):
    """New factors of an old product, still in float64.

    Attributes:
        A: (e, r, n).
        B: (e, m, r).
        singular_values: Those of each B·A, (e, k).
    """

    A: Tensor
    B: Tensor
    singular_values: Tensor


def balance_svd(A: Tensor, B: Tensor) -> Balanced:
    """Splits each product evenly: with B·A = U·Σ·Vᵀ, A becomes √Σ·Vᵀ and B becomes U·√Σ.

    Both factors then have the condition number √κ(B·A), the least that their product allows, and equal norms.

    A direction that the product does not use would be zero in both, and no gradient could ever bring it back. There B
    is zero, and A gets an unused direction of its own row space, at the length of an average row. A block whose
    product is zero stays as it is, so that training can start from it.

    Args:
        A: (e, r, n), finite, any floating dtype.
        B: (e, m, r).
    """
    svd = product_svd(A, B)
    rank, rows = A.shape[1], svd.Vh.shape[1]
    largest = svd.S[:, :1]  # (e, 1)
    used = largest * torch.finfo(svd.S.dtype).eps * rank < svd.S  # (e, k)
    roots = torch.where(used, svd.S, torch.zeros_like(svd.S)).sqrt()
    average = (roots.square().sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)).sqrt()
    lengths = torch.where(pad(used, (0, rows - used.shape[1])), pad(roots, (0, rows - used.shape[1])), average)

    # With more rows than ΔW has columns, those beyond are zero: A spans everything without them.
    new_A = pad(lengths[:, :, None] * svd.Vh, (0, 0, 0, rank - rows))
    new_B = pad(svd.U * roots[:, None, :], (0, rank - roots.shape[1]))
    zero = largest[:, :, None] == 0
    return Balanced(torch.where(zero, A.to(new_A.dtype), new_A), torch.where(zero, B.to(new_B.dtype), new_B), svd.S)


def relative_change(A: Tensor, B: Tensor, new_A: Tensor, new_B: Tensor) -> float:
    """Returns ‖B'·A' − B·A‖_F / ‖B·A‖_F over all blocks, without forming a product; 0 if both are zero."""
    parts = [part.double() for part in (A, B, new_A, new_B)]
    size = product_norm(parts[0], parts[1]).norm()
    change = product_norm(torch.cat([parts[2], parts[0]], 1), torch.cat([parts[3], -parts[1]], 2)).norm()
    return 0.0 if change == 0 else (change / size).item()


def is_block_diagonal(B: Tensor) -> bool:
    """Tells whether B (e, m, r) is three or four matrices on a diagonal, with zeros elsewhere.

    So kohya writes the adapters of a fused layer's parts (`split_qkv`), and its loader cuts out the blocks again.
    """
    for parts in (3, 4):
        if B.shape[-1] % parts == 0 and B.shape[-2] >= parts:
            used = B.ne(0).unflatten(-1, (parts, -1)).any(-1)  # (e, m, parts)
            if (used.sum(-1) <= 1).all() and used.any(-2).all():
                return True
    return False


def rounding_bound(singular_values: Tensor, dtypes: tuple[torch.dtype, torch.dtype]) -> float:
    """Returns by how much rounding balanced factors to these dtypes can change their product, relative to its norm.

    With unit roundoff u, ‖fl(B)·fl(A) − B·A‖_F ≤ (2u + u²)·√(σmax·Σσ) ≤ (2u + u²)·r^(1/4)·‖B·A‖_F, as long as no
    element underflows.
    """
    roundoff = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    rank = singular_values.shape[-1]
    # The decomposition itself is exact to about this.
    own = 100 * rank * torch.finfo(torch.float64).eps
    return (2 * roundoff + roundoff**2) * rank**0.25 + own
