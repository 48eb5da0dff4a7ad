"""Factors that do not fit together are refused with a message that says which, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdsopt.errors import PairShapeError
from sdsopt.pairs import BlockView, Experts, Groups, LoRAPair, TransposedExperts, UnequalGroups


class Layer(nn.Module):
    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)


def pair_of(A: tuple[int, ...], B: tuple[int, ...], view: BlockView | None = None) -> LoRAPair:
    layer = Layer(torch.ones(A), torch.ones(B))
    return LoRAPair("block.q_proj[x]", layer, "x", "A", "B", view or Groups(), lambda _: 1.0)


@pytest.mark.parametrize(
    ("A", "B", "view"),
    [
        ((4, 6), (5, 4), Groups()),
        ((4, 6, 3, 3), (5, 4, 1, 1), Groups()),
        ((4, 6, 3), (8, 2, 1), Groups(2)),
        ((12, 6), (5, 12), Experts(3)),
        ((6, 10), (12, 3), UnequalGroups((8, 4))),
        ((3, 10, 2), (3, 2, 6), TransposedExperts(3)),
    ],
)
def test_factors_that_fit(A: tuple[int, ...], B: tuple[int, ...], view: BlockView) -> None:
    pair = pair_of(A, B, view)
    pair.check()
    assert (pair.split_B(pair.B) @ pair.split_A(pair.A)).shape[0] == view.num_blocks


@pytest.mark.parametrize(
    ("A", "B", "view"),
    [
        ((4, 6), (5, 3), Groups()),
        ((4, 6, 3), (8, 4, 1), Groups(2)),
        ((5, 6, 3), (8, 2, 1), Groups(2)),
        ((12, 6), (5, 9), Experts(3)),
        ((13, 6), (5, 12), Experts(3)),
    ],
)
def test_ranks_that_differ(A: tuple[int, ...], B: tuple[int, ...], view: BlockView) -> None:
    with pytest.raises(PairShapeError, match="do not fit together") as error:
        pair_of(A, B, view).check()
    for part in ("block.q_proj[x]", str(A), str(B), "another rank"):
        assert part in str(error.value)


@pytest.mark.parametrize(("A", "B"), [((24,), (20,)), ((0,), (5, 4)), ((4, 6), (0, 4)), ((0, 6), (5, 0))])
def test_flat_or_empty_shards(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    with pytest.raises(PairShapeError, match=r"FSDP1 .* Use FSDP2") as error:
        pair_of(A, B).check()
    for part in ("block.q_proj[x]", str(A), str(B)):
        assert part in str(error.value)


def test_zero_3_leaves_the_true_shape_beside_an_empty_parameter() -> None:
    pair = pair_of((0,), (0,))
    pair.A.ds_shape, pair.B.ds_shape = torch.Size((4, 6)), torch.Size((5, 4))
    pair.check()
    assert pair.rank == 4
    pair.B.ds_shape = torch.Size((5, 3))
    with pytest.raises(PairShapeError, match="do not fit together"):
        pair.check()


def test_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        pair_of((4, 6), (5, 3)).check()
