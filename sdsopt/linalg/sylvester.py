"""The Sylvester equation with symmetric coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from sdsopt.linalg.spectrum import replace_non_finite


def solve_sylvester(left: Tensor, right: Tensor, constant: Tensor) -> Tensor:
    r"""Solves $L X + X R = C$ for symmetric positive definite L and R, and any C.

    In the eigenbases of both sides the equation is diagonal: $\hat X_{ij} = \hat C_{ij} / (\lambda_i + \mu_j)$.

    Cost: about 9·r³ for each decomposition and 8·r³ for the products. Never raises on non-finite input.

    Args:
        left: L (k, r, r).
        right: R (k, r, r).
        constant: C (k, r, r).

    Returns:
        X (k, r, r). Where L or R holds a non-finite number, NaN.
    """
    safe_left, left_finite = replace_non_finite(left)
    safe_right, right_finite = replace_non_finite(right)
    left_values, U = torch.linalg.eigh(safe_left)  # (k, r), (k, r, r)
    right_values, V = torch.linalg.eigh(safe_right)

    rotated = U.mT @ constant @ V
    X = U @ (rotated / (left_values[:, :, None] + right_values[:, None, :])) @ V.mT
    return X.masked_fill(~(left_finite & right_finite)[:, None, None], torch.nan)
