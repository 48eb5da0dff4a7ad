"""How the two stored factors of a pair are seen as e independent products B_i · A_i."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdsopt.sharding import Axes

Shape3 = tuple[int, int, int]


class BlockView(ABC):
    """Maps factors between the shapes a library stores and the canonical (e, r, n) and (e, m, r).

    Block i of the weight update is ``scaling * B[i] @ A[i]``. Views hold no tensor, so one serves the factors, their
    gradients and their updates alike. Splitting returns a view of the input wherever strides allow it.
    """

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """The number e of independent products."""

    @abstractmethod
    def shape_A(self, shape: tuple[int, ...]) -> Shape3:
        """Returns (e, r, n) for a stored A of this shape (ndim ≥ 2), rounding down where it does not divide."""

    @abstractmethod
    def shape_B(self, shape: tuple[int, ...]) -> Shape3:
        """Returns (e, m, r) for a stored B of this shape (ndim ≥ 2), rounding down where it does not divide."""

    # Block shapes are rounded down, so a rank that the blocks do not divide shows as elements left over.

    def divides_A(self, shape: tuple[int, ...]) -> bool:
        """Tells whether a stored A of this shape falls into blocks without remainder."""
        return prod(self.shape_A(shape)) == prod(shape)

    def divides_B(self, shape: tuple[int, ...]) -> bool:
        """Tells whether a stored B of this shape falls into blocks without remainder."""
        return prod(self.shape_B(shape)) == prod(shape)

    @abstractmethod
    def axes_A(self, ndim: int) -> Axes:
        """Returns along which axes a stored A may be cut; "rows" are those of the tall factor Aᵀ, its columns."""

    @abstractmethod
    def axes_B(self, ndim: int) -> Axes:
        """Returns along which axes a stored B may be cut."""

    # A factor that is cut along these axes alone is split and joined as a whole one is.

    @abstractmethod
    def split_A(self, tensor: Tensor) -> Tensor:
        """Returns A, or a tensor of its shape, as (e, r, n)."""

    @abstractmethod
    def split_B(self, tensor: Tensor) -> Tensor:
        """Returns B, or a tensor of its shape, as (e, m, r)."""

    @abstractmethod
    def join_A(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inverse of `split_A`: returns a contiguous tensor of the given shape."""

    @abstractmethod
    def join_B(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Inverse of `split_B`: returns a contiguous tensor of the given shape."""


class _BlockMajorA(BlockView):
    """Views of an A that is stored block by block, so that splitting it is a reshape."""

    def shape_A(self, shape: tuple[int, ...]) -> Shape3:
        return self.num_blocks, shape[0] // self.num_blocks, prod(shape[1:])

    def axes_A(self, ndim: int) -> Axes:
        return Axes(free=tuple(range(1, ndim)))

    def split_A(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape_A(tensor.shape))  # (e, r, n)

    def join_A(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        return blocks.reshape(shape).contiguous()


@final
@dataclass(frozen=True)
class Groups(_BlockMajorA):
    """Plain layers, and grouped convolutions: channel group i of B reads only the i-th share of A's r·e outputs.

    A is (e·r, in, k…) and B is (e·m, r, 1…): both are block-major, so every split is a reshape. A's kernel sits on
    its input side, which makes (in, k…) one flat input axis.

    Attributes:
        groups: The number of groups e; 1 for Linear, Conv1D, Embedding, attention and convolutions without groups.
    """

    groups: int = 1

    @property
    def num_blocks(self) -> int:
        return self.groups

    def shape_B(self, shape: tuple[int, ...]) -> Shape3:
        return self.groups, shape[0] // self.groups, prod(shape[1:])

    def axes_B(self, ndim: int) -> Axes:
        # A cut across several groups leaves uneven pieces of them.
        return Axes(free=(0,) if self.groups == 1 else ())

    def split_A(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if self.groups == 1 and tensor.ndim == 2 else super().split_A(tensor)

    def split_B(self, tensor: Tensor) -> Tensor:
        if self.groups == 1 and tensor.ndim == 2:  # nearly always, and at every step
            return tensor.unsqueeze(0)
        return tensor.reshape(self.shape_B(tensor.shape))  # (e, m, r)

    def join_B(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        return blocks.reshape(shape).contiguous()


@final
@dataclass(frozen=True)
class Experts(_BlockMajorA):
    """PEFT's stacked experts: A is (e·r, n) expert by expert, B is (m, r·e) with the expert running fastest.

    The two orders differ, so a plain reshape of B would mix the experts.

    Attributes:
        experts: The number of experts e.
    """

    experts: int

    @property
    def num_blocks(self) -> int:
        return self.experts

    def shape_B(self, shape: tuple[int, ...]) -> Shape3:
        return self.experts, shape[0], prod(shape[1:]) // self.experts

    def axes_B(self, ndim: int) -> Axes:
        return Axes(free=(0,))

    def split_B(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1, self.experts).permute(2, 0, 1)  # (m, r, e) → (e, m, r)

    def join_B(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        return blocks.permute(1, 2, 0).reshape(shape).contiguous()  # (e, m, r) → (m, r, e) → (m, r·e)


@final
@dataclass(frozen=True)
class UnequalGroups(_BlockMajorA):
    """One projection for queries, keys and values whose widths differ (grouped-query attention).

    A is (e·r, n), B is (m_1 + … + m_e, r). The blocks of B are padded with zero rows to the longest: these add nothing
    to BᵀB, and a gradient's stay zero.

    Attributes:
        rows: The lengths m_1, …, m_e.
    """

    rows: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.rows)

    def shape_B(self, shape: tuple[int, ...]) -> Shape3:
        return len(self.rows), max(self.rows), prod(shape[1:])

    def axes_B(self, ndim: int) -> Axes:
        return Axes(free=())

    def divides_B(self, shape: tuple[int, ...]) -> bool:
        return sum(self.rows) == shape[0]

    def split_B(self, tensor: Tensor) -> Tensor:
        return pad_sequence(list(tensor.flatten(1).split(self.rows)), batch_first=True)  # (e, m_max, r)

    def join_B(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        parts = [block[:length] for block, length in zip(blocks, self.rows, strict=True)]
        return torch.cat(parts).reshape(shape)


@final
@dataclass(frozen=True)
class TransposedExperts(BlockView):
    """Experts for `x @ A @ B`: A is (e, n, r) and B is (e, r, m).

    Attributes:
        experts: The number of experts e.
    """

    experts: int

    @property
    def num_blocks(self) -> int:
        return self.experts

    def shape_A(self, shape: tuple[int, ...]) -> Shape3:
        return self.experts, shape[-1], prod(shape[1:-1])

    def shape_B(self, shape: tuple[int, ...]) -> Shape3:
        return self.experts, prod(shape[2:]), shape[1]

    def axes_A(self, ndim: int) -> Axes:
        return Axes(free=tuple(range(1, ndim - 1)), batch=(0,))

    def axes_B(self, ndim: int) -> Axes:
        return Axes(free=tuple(range(2, ndim)), batch=(0,))

    def split_A(self, tensor: Tensor) -> Tensor:
        return tensor.mT  # (e, r, n)

    def split_B(self, tensor: Tensor) -> Tensor:
        return tensor.mT  # (e, m, r)

    def join_A(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        return blocks.mT.reshape(shape).contiguous()

    def join_B(self, blocks: Tensor, shape: tuple[int, ...]) -> Tensor:
        return blocks.mT.reshape(shape).contiguous()
