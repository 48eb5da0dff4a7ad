"""The polar factor against the SVD."""

from __future__ import annotations

import pytest
import torch

import oracle
from sdsopt.linalg import polar_factor
from toy import factor


@pytest.mark.parametrize(("rows", "rank"), [(5, 1), (40, 16), (16, 16), (200, 128)])
@pytest.mark.parametrize("condition", [1.0, 100.0, 1e4])
def test_it_is_the_svds(rows: int, rank: int, condition: float) -> None:
    X = factor(rows, rank, condition)
    assert oracle.relative_error(polar_factor(X[None], 0.0)[0], oracle.polar(X)) < 1e-16 * rank * condition**2 + 1e-13


def test_damping_leaves_out_what_is_small() -> None:
    X = torch.diag(torch.tensor([1.0, 1e-1, 1e-3, 1e-6, 0.0], dtype=torch.float64))
    found = polar_factor(X[None], 1e-6)[0].diagonal()
    torch.testing.assert_close(found, (X / (X.square() + 1e-6).sqrt()).diagonal(), rtol=1e-9, atol=1e-12)


def test_zero_and_wide_and_non_finite() -> None:
    assert torch.equal(polar_factor(torch.zeros(1, 5, 3), 1e-6), torch.zeros(1, 5, 3))
    X = torch.stack([factor(3, 5, seed=seed) for seed in range(2)])
    assert oracle.relative_error(polar_factor(X[:1], 1e-12)[0], oracle.polar(X[0])) < 1e-6
    X[1, 0, 0] = torch.nan
    found = polar_factor(X, 1e-12)
    assert found[0].isfinite().all() and found[1].isnan().all()
