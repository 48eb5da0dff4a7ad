"""From eigenvalues and eigenvectors to damped inverse roots: the half that `eigh` and `svd` share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdsopt.linalg.base import RootResult, RootStatus


def replace_non_finite(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Puts the identity in place of matrices that LAPACK would raise on.

    Args:
        matrices: (k, r, r).

    Returns:
        The matrices to decompose (k, r, r), and a mask (k,) that is True where they were finite.
    """
    finite = matrices.isfinite().flatten(1).all(1)  # (k,)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return torch.where(finite.view(-1, 1, 1), matrices, identity), finite


def roots_from_spectrum(
    vectors: Tensor,
    eigenvalues: Tensor,
    finite: Tensor,
    exponents: Sequence[float],
    damping: float,
    rounding: float | None = None,
) -> RootResult:
    """Assembles V·diag((λ + δ·λmax)^(-p))·Vᵀ for every exponent.

    Args:
        vectors: Eigenvectors in columns (k, r, r).
        eigenvalues: (k, r), in any order; rounding may have left small negative ones.
        finite: (k,) mask; the roots of the others become NaN.
        exponents: The powers p.
        damping: Relative damping δ.
        rounding: The relative error of the eigenvalues; None for that of their dtype.

    Returns:
        The roots, with zero matrices mapped to the identity.
    """
    rank = eigenvalues.shape[-1]
    largest = eigenvalues.amax(-1, keepdim=True)  # (k, 1)
    zero = largest <= 0
    # Below rounding a direction carries no information; without this floor δ = 0 would divide by zero there.
    rounding = torch.finfo(eigenvalues.dtype).eps if rounding is None else rounding
    floor = largest * (rounding * rank)
    damped = eigenvalues.clamp(min=floor) + damping * largest
    damped = torch.where(zero, torch.ones_like(damped), damped)

    identity = torch.eye(rank, dtype=vectors.dtype, device=vectors.device)
    roots: list[Tensor] = []
    for exponent in exponents:
        root = (vectors * damped.pow(-exponent)[:, None, :]) @ vectors.mT  # (k, r, r)
        root = torch.where(zero[:, :, None], identity, root)
        roots.append(root.masked_fill(~finite.view(-1, 1, 1), torch.nan))

    status = zero.squeeze(-1).to(torch.uint8) * RootStatus.ZERO.value
    return RootResult(tuple(roots), status.masked_fill(~finite, RootStatus.NON_FINITE.value))


def symmetric_eigenvalues(matrices: Tensor) -> Tensor:
    """Returns the eigenvalues of symmetric matrices (k, r, r), rising: (k, r). Those of a non-finite one are NaN."""
    replaced, finite = replace_non_finite(matrices)
    return torch.linalg.eigvalsh(replaced).masked_fill(~finite[:, None], torch.nan)
