"""What only an iteration can get wrong: where it ends, and what it does when it does not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from sdsopt.linalg import NewtonSchulzInverseRoot, RootStatus, make_inverse_root
from toy import factor

ROOT = NewtonSchulzInverseRoot()


@settings(deadline=None, max_examples=60)
@given(
    rank=st.integers(2, 64),
    condition=st.floats(1.0, 1e4),
    exponent=st.sampled_from([0.5, 1.0, 1.5, -0.5, -1.0]),
    seed=st.integers(0, 100),
)
def test_it_converges_up_to_a_condition_number_of_1e8(rank: int, condition: float, exponent: float, seed: int) -> None:
    """cond(M) is the square of the factor's."""
    X = factor(rank + 7, rank, condition, seed)
    [found], status = ROOT.compute(ROOT.reduce(X)[None], [exponent], 0.0)
    assert status.tolist() == [RootStatus.OK]
    error = oracle.relative_error(found[0], oracle.inverse_root(X, exponent, 0.0))
    assert error < 1e-10 + 1e-14 * condition**2


@pytest.mark.parametrize("rank", [2, 16, 128])
def test_clustered_largest_eigenvalues(rank: int) -> None:
    """The estimate of λmax is worst where others lie just below it; damping must not feel that."""
    values = torch.linspace(1 - 1e-4, 1, rank, dtype=torch.float64)
    M = torch.diag(values)
    [found], _ = ROOT.compute(M[None], [0.5], 0.1)
    torch.testing.assert_close(found[0].diagonal(), (values + 0.1).pow(-0.5), rtol=1e-5, atol=0)


def test_other_exponents_are_left_to_eigh() -> None:
    M = ROOT.reduce(factor(9, 4, 30.0))[None]
    for exponent in (0.25, 0.3):
        [found], _ = ROOT.compute(M, [exponent], 1e-6)
        [expected], _ = make_inverse_root("eigh").compute(M, [exponent], 1e-6)
        assert torch.equal(found, expected)


def test_a_matrix_that_does_not_converge_gives_a_multiple_of_the_identity() -> None:
    """No Gram matrix has an eigenvalue of -1/2; only rounding beyond the damping could make one. It stays alone."""
    good = ROOT.reduce(factor(9, 2, 3.0))
    [found], status = ROOT.compute(torch.stack([good, torch.diag(torch.tensor([1.0, -0.5])).double()]), [0.5], 0.0)
    assert status.tolist() == [RootStatus.OK, RootStatus.FALLBACK]
    assert oracle.relative_error(found[0], oracle.inverse_root(factor(9, 2, 3.0), 0.5, 0.0)) < 1e-13
    assert found[1, 0, 0] > 0
    assert torch.equal(found[1], found[1, 0, 0] * torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e15])
def test_float32_is_as_exact_as_its_digits_allow(scale: float) -> None:
    """Where the device has no float64."""
    X = factor(40, 8, 10.0)
    M = (scale * X.T @ X).float()[None]
    [found], status = ROOT.compute(M, [0.5], 1e-3)
    assert found.dtype == torch.float32
    assert status.tolist() == [RootStatus.OK]
    assert oracle.relative_error(found[0] * scale**0.5, oracle.inverse_root(X, 0.5, 1e-3)) < 1e-4


def test_automatic_choice() -> None:
    M = ROOT.reduce(factor(9, 4, 30.0))[None]
    [auto], _ = make_inverse_root("auto").compute(M, [0.5], 1e-6)
    [eigh], _ = make_inverse_root("eigh").compute(M, [0.5], 1e-6)
    assert torch.equal(auto, eigh)  # on a CPU
    elsewhere = make_inverse_root("auto").compute(M.to("meta"), [0.5], 1e-6)
    assert elsewhere.roots[0].shape == M.shape
