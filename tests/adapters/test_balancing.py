"""The new factors: same product, equal norms, the least condition number, and something to train from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import relative_error
from sdsopt.adapters.balancing import balance_svd, is_block_diagonal, relative_change, rounding_bound
from sdsopt.diagnostics import balance, condition_number, product_svd, singular_values
from toy import factor


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    m, n, r, e = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    condition, scale = draw(st.sampled_from([1.0, 30.0, 1e4])), draw(st.sampled_from([1e-5, 1.0, 1e5]))
    A = torch.stack([factor(r, n, condition, seed=i) for i in range(e)])
    return scale * A, torch.stack([factor(m, r, condition, seed=10 + i) for i in range(e)])


@settings(deadline=None)
@given(factors())
def test_same_product_in_balanced_factors(pair: tuple[Tensor, Tensor]) -> None:
    A, B = pair
    new_A, new_B, values = balance_svd(A, B)
    assert new_A.shape == A.shape and new_B.shape == B.shape
    assert relative_error(new_B @ new_A, B @ A) < 1e-12
    k = values.shape[-1]
    if k == A.shape[1]:  # full rank: nothing had to be filled up
        torch.testing.assert_close(balance(new_A, new_B), torch.ones(len(A)).double())
        least = condition_number(values).sqrt()
        for new in (new_A, new_B):
            torch.testing.assert_close(condition_number(singular_values(new)), least, rtol=1e-6, atol=0)
    # Balancing twice changes nothing but signs.
    again = balance_svd(new_A, new_B)
    torch.testing.assert_close(singular_values(again.A), singular_values(new_A), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(factors(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_rounding_stays_below_its_bound(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    A, B = (part.to(dtype) for part in pair)
    new_A, new_B, values = balance_svd(A, B)
    new_A, new_B = new_A.to(dtype), new_B.to(dtype)
    change = relative_change(A, B, new_A, new_B)
    assert change <= rounding_bound(values, (dtype, dtype))
    expected = relative_error(new_B.double() @ new_A.double(), B.double() @ A.double())
    assert change == pytest.approx(expected, rel=1e-3, abs=1e-13)
    assert rounding_bound(torch.ones(1, 4096), (torch.float32, torch.float32)) < 1e-6


def test_directions_that_are_not_used_can_still_be_trained() -> None:
    A, B = factor(4, 10, 3.0), factor(12, 4, 3.0, seed=1)
    B[:, 1] = 0
    new_A, new_B, values = (part[0] for part in balance_svd(A[None], B[None]))
    assert relative_error(new_B @ new_A, B @ A) < 1e-12
    lengths = new_A.norm(dim=1)
    assert torch.equal(new_B[:, 3], torch.zeros(12).double())
    assert lengths[3] == pytest.approx(values[:3].mean().sqrt().item())
    torch.testing.assert_close(new_A @ new_A.T, torch.diag(lengths**2))  # a direction of its own
    gradient_B = torch.randn(12, 10, dtype=torch.float64) @ new_A.T
    assert gradient_B[:, 3].norm() > 0


@pytest.mark.parametrize(("rows", "columns"), [(2, 9), (9, 2)])
def test_ranks_above_a_side_of_the_update(rows: int, columns: int) -> None:
    A, B = factor(5, columns, 3.0), factor(rows, 5, 3.0, seed=1)
    new_A, new_B, _ = (part[0] for part in balance_svd(A[None], B[None]))
    assert relative_error(new_B @ new_A, B @ A) < 1e-12
    # A spans as many directions as there are, so that B can reach every update.
    assert torch.linalg.matrix_rank(new_A) == min(5, columns)


def test_a_zero_block_keeps_its_factors() -> None:
    A, B = torch.stack([factor(3, 6), factor(3, 6, seed=1)]), torch.stack([torch.zeros(5, 3), factor(5, 3, seed=2)])
    new_A, new_B, _ = balance_svd(A, B)
    assert torch.equal(new_A[0], A[0]) and not new_B[0].any()
    assert relative_error(new_B[1] @ new_A[1], B[1] @ A[1]) < 1e-12
    assert product_svd(new_A, new_B).S[1].all()


def test_block_diagonal_factors_are_known() -> None:
    blocks = [torch.randn(4, 2), torch.randn(4, 2), torch.randn(6, 2)]
    B = torch.block_diag(*blocks)[None]
    assert is_block_diagonal(B)
    assert is_block_diagonal(torch.block_diag(*blocks, torch.randn(3, 2))[None])
    assert not is_block_diagonal(torch.zeros_like(B))
    assert not is_block_diagonal(torch.randn(1, 14, 6))
    B[0, 0, 5] = 1e-3
    assert not is_block_diagonal(B)
