"""Every method against the SVD in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from sdsopt.linalg import RootStatus, available_inverse_roots, make_inverse_root
from toy import factor

METHODS = available_inverse_roots()


def test_there_are_methods() -> None:
    assert {"eigh", "svd"} <= set(METHODS)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(1, 40),
    extra=st.integers(0, 30),
    condition=st.sampled_from([1.0, 10.0, 100.0, 1e4]),
    exponent=st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0]),
    damping=st.sampled_from([0.0, 1e-6, 0.1]),
)
def test_roots_match_the_oracle(
    method: str, rank: int, extra: int, condition: float, exponent: float, damping: float
) -> None:
    X = factor(rank + extra, rank, condition, seed=rank)
    root = make_inverse_root(method)
    [found], status = root.compute(root.reduce(X)[None], [exponent], damping)
    assert status.tolist() == [RootStatus.OK]
    assert oracle.relative_error(found[0], oracle.inverse_root(X, exponent, damping)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_factors_that_are_wider_than_long(method: str) -> None:
    """d < r: the Gram matrix has no full rank, and damping alone bounds the root."""
    X = factor(3, 5)
    root = make_inverse_root(method)
    [found], _ = root.compute(root.reduce(X)[None], [0.5], 1e-4)
    assert oracle.relative_error(found[0], oracle.inverse_root(X, 0.5, 1e-4)) < 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_matrices_one_by_one(method: str) -> None:
    root = make_inverse_root(method)
    reduced = torch.stack([root.reduce(factor(9, 4, condition, seed)) for seed, condition in enumerate([1, 7, 50])])
    batch = root.compute(reduced, [0.5, 1.0], 1e-6)
    for i in range(3):
        alone = root.compute(reduced[i : i + 1], [0.5, 1.0], 1e-6)
        for together, single in zip(batch.roots, alone.roots, strict=True):
            torch.testing.assert_close(together[i], single[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_zero_gives_the_identity(method: str, damping: float) -> None:
    root = make_inverse_root(method)
    [found], status = root.compute(root.reduce(torch.zeros(1, 6, 3, dtype=torch.float64)), [0.5], damping)
    assert torch.equal(found[0], torch.eye(3, dtype=torch.float64))
    assert status.tolist() == [RootStatus.ZERO]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_stays_non_finite_and_alone(method: str, bad: float) -> None:
    X = torch.stack([factor(6, 3, seed=seed) for seed in range(3)])
    X[1, 2, 1] = bad
    root = make_inverse_root(method)
    [found], status = root.compute(root.reduce(X), [0.5], 1e-6)
    assert status.tolist() == [RootStatus.OK, RootStatus.NON_FINITE, RootStatus.OK]
    assert found[1].isnan().all()
    for i in (0, 2):
        assert oracle.relative_error(found[i], oracle.inverse_root(X[i], 0.5, 1e-6)) < 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_rank_deficient_without_damping_stays_finite(method: str) -> None:
    X = factor(8, 4)
    X[:, 3] = X[:, 0]
    root = make_inverse_root(method)
    [found], _ = root.compute(root.reduce(X)[None], [0.5], 0.0)
    assert found.isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_scale_cancels(method: str) -> None:
    """Damping is relative: (cX)'s root is c^(-2p) times X's, however small c."""
    X = factor(8, 4, 30.0)
    root = make_inverse_root(method)
    [plain], _ = root.compute(root.reduce(X)[None], [0.5], 1e-3)
    [small], _ = root.compute(root.reduce(1e-12 * X)[None], [0.5], 1e-3)
    assert oracle.relative_error(1e-12 * small, plain) < 1e-10


def test_unknown_method_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"newton.*eigh, svd"):
        make_inverse_root("newton")
    method = make_inverse_root("eigh")
    assert make_inverse_root(method) is method
