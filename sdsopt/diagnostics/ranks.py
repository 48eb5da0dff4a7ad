"""How many directions a matrix really uses, as numbers between 1 and its rank."""

from __future__ import annotations

import torch
from torch import Tensor


def stable_rank(values: Tensor) -> Tensor:
    """Returns ‖X‖_F² / σmax², which small singular values hardly raise (Rudelson & Vershynin 2007).

    Args:
        values: Singular values (..., k) with k ≥ 1, largest first.

    Returns:
        (...), from 1 to k; 0 for a zero matrix, NaN where a value is.
    """
    relative, zero = _relative(values)
    return relative.square().sum(-1).masked_fill(zero, 0.0)


def effective_rank(values: Tensor) -> Tensor:
    """Returns the exponential of the entropy of σ / Σσ (Roy & Vetterli 2007).

    Args:
        values: Singular values (..., k) with k ≥ 1, largest first.

    Returns:
        (...), from 1 to k; 0 for a zero matrix, NaN where a value is.
    """
    relative, zero = _relative(values)
    shares = relative / relative.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1).exp().masked_fill(zero, 0.0)


def _relative(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns values / σmax, so that squares cannot overflow, and where the matrix is zero."""
    largest = values[..., :1]
    zero = largest == 0
    return torch.where(zero, torch.ones_like(values), values / largest), zero.squeeze(-1)
