"""The transform that gives both factors of a product one Gram matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from sdsopt.linalg import balancing_transform
from toy import factor

RANK = 8


def pair(condition: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    wide, tall = factor(RANK, 30, condition, seed), 50 * factor(20, RANK, condition, seed + 1)
    return wide[None], tall[None]


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e6])
def test_balanced_with_the_same_product(condition: float) -> None:
    wide, tall = pair(condition)
    T, T_inverse = balancing_transform(wide, tall)
    new_wide, new_tall = T @ wide, tall @ T_inverse
    assert oracle.relative_error(new_tall @ new_wide, tall @ wide) < 1e-13
    assert oracle.relative_error(new_wide @ new_wide.mT, new_tall.mT @ new_tall) < 1e-12
    torch.testing.assert_close(T, T.mT)
    assert (torch.linalg.eigvalsh(T) > 0).all()
    # Both take the root of the product's condition number.
    values = torch.linalg.svdvals(tall @ wide)[0]
    expected = (values[0] / values[RANK - 1]).sqrt()
    torch.testing.assert_close(torch.linalg.cond(new_wide)[0], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.linalg.cond(new_tall)[0], expected, rtol=1e-5, atol=0)


def test_it_is_the_root_of_the_geometric_mean() -> None:
    wide, tall = pair(10.0)
    M, N = wide[0] @ wide[0].T, tall[0].T @ tall[0]
    mean = balancing_transform(wide, tall)[0][0] @ balancing_transform(wide, tall)[0][0]
    torch.testing.assert_close(mean @ M @ mean, N)  # Riccati's equation, which defines M⁻¹ # N


def test_balanced_factors_stay() -> None:
    wide, tall = pair(10.0)
    T, T_inverse = balancing_transform(wide, tall)
    again, again_inverse = balancing_transform(T @ wide, tall @ T_inverse)
    identity = torch.eye(RANK, dtype=torch.float64)[None]
    torch.testing.assert_close(again, identity, rtol=0, atol=1e-12)
    torch.testing.assert_close(again_inverse, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["zero", "rank", "nan", "inf"])
def test_what_cannot_be_balanced_is_left_alone_and_its_neighbours_are_not(which: str) -> None:
    (wide, tall), (good_wide, good_tall) = pair(10.0), pair(5.0, seed=7)
    if which == "zero":
        tall = torch.zeros_like(tall)  # LoRA's start
    elif which == "rank":
        wide[0, 1] = 2 * wide[0, 0]
    else:
        wide[0, 0, 0] = float(which)
    T, T_inverse = balancing_transform(torch.cat([wide, good_wide]), torch.cat([tall, good_tall]))
    identity = torch.eye(RANK, dtype=torch.float64)
    assert torch.equal(T[0], identity)
    assert torch.equal(T_inverse[0], identity)
    torch.testing.assert_close(T[1], balancing_transform(good_wide, good_tall)[0][0])


@pytest.mark.parametrize(("columns", "rows"), [(5, 20), (20, 5)])
def test_ranks_above_a_dimension(columns: int, rows: int) -> None:
    T, T_inverse = balancing_transform(torch.randn(2, RANK, columns), torch.randn(2, rows, RANK))
    assert torch.equal(T, torch.eye(RANK).expand(2, RANK, RANK))
    assert torch.equal(T_inverse, T)
