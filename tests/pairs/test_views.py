"""The canonical views: splitting loses nothing, and each block's product is exactly the update that PEFT applies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peft_layers import KINDS, adapted, product
from sdsopt.pairs import BlockView, Experts, Groups, TransposedExperts, UnequalGroups, find_pairs


@dataclass(frozen=True)
class Stored:
    """A view together with the shapes of the factors that it views, and of its blocks."""

    view: BlockView
    A: tuple[int, ...]
    B: tuple[int, ...]
    blocks_A: tuple[int, int, int]
    blocks_B: tuple[int, int, int]


@st.composite
def stored_factors(draw: st.DrawFn) -> Stored:
    e, r, m, n = (draw(st.integers(1, 5)) for _ in range(4))
    kernel = tuple(draw(st.lists(st.integers(1, 3), max_size=3)))
    ones = (1,) * len(kernel)
    width = torch.Size((n, *kernel)).numel()
    kind = draw(st.sampled_from(["plain", "groups", "experts", "transposed"]))
    if kind == "plain":
        return Stored(Groups(), (r, n, *kernel), (m, r, *ones), (1, r, width), (1, m, r))
    if kind == "groups":
        return Stored(Groups(e), (e * r, n, *kernel), (e * m, r, *ones), (e, r, width), (e, m, r))
    if kind == "transposed":
        return Stored(TransposedExperts(e), (e, n, r), (e, r, m), (e, r, n), (e, m, r))
    return Stored(Experts(e), (e * r, n), (m, r * e), (e, r, n), (e, m, r))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(1, 4))
def test_unequal_groups_are_padded_with_zeros(rows: list[int], r: int) -> None:
    view = UnequalGroups(tuple(rows))
    B = 1 + numbered((sum(rows), r))
    blocks = view.split_B(B)
    assert blocks.shape == (len(rows), max(rows), r) == view.shape_B(B.shape)
    assert view.divides_B(B.shape)
    assert torch.equal(view.join_B(blocks, B.shape), B)
    assert torch.equal(blocks.sum((1, 2)), torch.stack([part.sum() for part in B.split(rows)]))


def numbered(shape: tuple[int, ...]) -> Tensor:
    """All elements differ, so that any reordering shows."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


@settings(deadline=None, max_examples=100)
@given(stored_factors())
def test_join_inverts_split(stored: Stored) -> None:
    A, B = numbered(stored.A), numbered(stored.B)
    blocks_A, blocks_B = stored.view.split_A(A), stored.view.split_B(B)
    assert blocks_A.shape == stored.blocks_A == stored.view.shape_A(stored.A)
    assert blocks_B.shape == stored.blocks_B == stored.view.shape_B(stored.B)
    assert len(blocks_A) == len(blocks_B) == stored.view.num_blocks

    joined_A, joined_B = stored.view.join_A(blocks_A, stored.A), stored.view.join_B(blocks_B, stored.B)
    assert torch.equal(joined_A, A) and torch.equal(joined_B, B)
    assert joined_A.is_contiguous() and joined_B.is_contiguous()


@settings(deadline=None, max_examples=50)
@given(stored_factors())
def test_splitting_copies_nothing(stored: Stored) -> None:
    A, B = numbered(stored.A), numbered(stored.B)
    assert stored.view.split_A(A).data_ptr() == A.data_ptr()
    assert stored.view.split_B(B).data_ptr() == B.data_ptr()


@settings(deadline=None, max_examples=50)
@given(stored_factors())
def test_join_is_contiguous_whatever_the_strides(stored: Stored) -> None:
    """Solvers return column-major blocks, which fused optimizers would read wrongly."""
    A, B = numbered(stored.A), numbered(stored.B)
    column_major_A = stored.view.split_A(A).mT.contiguous().mT
    column_major_B = stored.view.split_B(B).mT.contiguous().mT
    joined_A = stored.view.join_A(column_major_A, stored.A)
    joined_B = stored.view.join_B(column_major_B, stored.B)
    assert joined_A.is_contiguous() and joined_B.is_contiguous()
    assert torch.equal(joined_A, A) and torch.equal(joined_B, B)


@pytest.mark.parametrize("name", KINDS)
def test_products_are_the_update_that_peft_applies(name: str) -> None:
    kind = KINDS[name]
    pairs = find_pairs(adapted(kind.build(), kind.config))
    assert len(pairs) == kind.pairs
    for pair in pairs:
        pair.check()
        expected = pair.module.get_delta_weight(pair.adapter)
        blocks = product(pair)
        assert blocks.shape[0] == pair.num_blocks
        assert expected.dtype == torch.float64 and expected.abs().max() > 0.01
        torch.testing.assert_close(
            (blocks.mT if kind.transposed else blocks).reshape(expected.shape), expected, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("layer", "convolve", "size"),
    [
        (lambda: nn.Conv1d(6, 8, 3, groups=2), torch.conv1d, (7,)),
        (lambda: nn.Conv1d(4, 4, 3, groups=4), torch.conv1d, (7,)),
        (lambda: nn.Conv2d(6, 8, (2, 3), groups=2), torch.conv2d, (5, 6)),
        (lambda: nn.Conv3d(4, 6, 2, groups=2), torch.conv3d, (3, 4, 3)),
    ],
    ids=["conv1d", "depthwise", "conv2d", "conv3d"],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_products_of_grouped_convolutions(
    layer: Callable[[], nn.Module], convolve: Callable[..., Tensor], size: tuple[int, ...]
) -> None:
    """`get_delta_weight` raises here. A reads all channels, so the blocks are the rows of a dense kernel."""
    model = adapted(layer(), {"r": 4})
    [pair] = find_pairs(model)
    base: Any = pair.module.get_submodule("base_layer")
    assert pair.num_blocks == base.groups > 1 and pair.rank == 4 // base.groups

    x = torch.randn(2, base.in_channels, *size, dtype=torch.float64)
    kernel = product(pair).reshape(base.out_channels, base.in_channels, *base.kernel_size)
    torch.testing.assert_close(convolve(x, kernel), model(x) - base(x), rtol=1e-10, atol=1e-10)


def test_pairs_join_to_the_shapes_of_their_parameters() -> None:
    found = 0
    for kind in KINDS.values():
        for pair in find_pairs(adapted(kind.build(), kind.config)):
            assert torch.equal(pair.join_A(pair.split_A(pair.A)), pair.A)
            assert torch.equal(pair.join_B(pair.split_B(pair.B)), pair.B)
            assert pair.split_A(pair.A).shape[:2] == (pair.num_blocks, pair.rank)
            assert pair.split_B(pair.B).shape[::2] == (pair.num_blocks, pair.rank)
            found += 1
    assert found == sum(kind.pairs for kind in KINDS.values())
