"""The Sylvester equation, by its residual and against Bartels and Stewart's algorithm."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

import oracle
from sdsopt.linalg import solve_sylvester
from toy import factor


def gram(rank: int, condition: float, seed: int) -> Tensor:
    X = factor(rank + 3, rank, condition, seed)
    return X.T @ X


def constant(rank: int, seed: int = 5) -> Tensor:
    """Not symmetric: then a transposed solution has a residual."""
    return torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 5, 16, 64, 128])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3, 1e6])
def test_residual(rank: int, condition: float) -> None:
    left, right, C = gram(rank, condition, 1), gram(rank, 3.0, 2), constant(rank)
    for L, R in ((left, right), (right, left)):
        [X] = solve_sylvester(L[None], R[None], C[None])
        assert oracle.relative_error(L @ X + X @ R, C) < 1e-12
        expected = torch.from_numpy(scipy.linalg.solve_sylvester(L.numpy(), R.numpy(), C.numpy()))
        assert oracle.relative_error(X, expected) < 1e-11
        if rank > 1:
            assert oracle.relative_error(L @ X.T + X.T @ R, C) > 0.1


def test_two_ill_conditioned_sides() -> None:
    """The small eigenvalues meet in the denominator, and the residual stays small against what is summed."""
    L, R, C = gram(8, 1e4, 1), gram(8, 1e4, 2), constant(8)
    [X] = solve_sylvester(L[None], R[None], C[None])
    assert (L @ X + X @ R - C).norm() < 1e-14 * X.norm()


def test_a_batch_is_its_equations_one_by_one_and_non_finite_ones_stay_alone() -> None:
    L, R = (torch.stack([gram(4, condition, seed) for condition in (1.0, 7.0, 50.0)]) for seed in (1, 2))
    C = torch.stack([constant(4, seed) for seed in range(3)])
    L[0, 1, 1] = torch.nan
    X = solve_sylvester(L, R, C)
    assert X[0].isnan().all()
    for i in (1, 2):
        torch.testing.assert_close(X[i], solve_sylvester(L[i : i + 1], R[i : i + 1], C[i : i + 1])[0])
    C[1, 0, 0] = torch.inf
    assert not solve_sylvester(L, R, C)[1].isfinite().any()
