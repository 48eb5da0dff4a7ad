"""One pair's tensors while they are computed with, and the roots of many pairs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sdsopt.corrections import Factors, PairTensors
from sdsopt.engine.recipe import Recipe
from sdsopt.linalg import accurate_dtype
from sdsopt.pairs import LoRAPair
from sdsopt.sharding import WHOLE, Distribution, Group, add_up, is_distributed, merge

_NONE = PairTensors(None, None)

Part = tuple[tuple[Group, ...], Tensor]


class Distributions(NamedTuple):
    """Where the two factors of a pair lie."""

    A: Distribution = WHOLE
    B: Distribution = WHOLE

    @classmethod
    def of(cls, pair: LoRAPair, recipe: Recipe) -> Distributions:
        """Returns where a pair's factors lie, and how to compute with them there."""
        A, B = pair.A, pair.B
        if not (is_distributed(A) or is_distributed(B)):
            return _LOCAL
        both = cls(
            Distribution.of(A, pair.blocks.axes_A(A.ndim)),
            Distribution.of(B, pair.blocks.axes_B(B.ndim)),
        )
        # Blocks that are cut must meet their partners.
        if recipe.by_rows and both.A.batch == both.B.batch:
            return both
        return cls(both.A.whole(), both.B.whole())

    @property
    def are_local(self) -> bool:
        """Whether one computes with both as if there were one process."""
        return self.A.is_whole and self.B.is_whole

    @property
    def communicate(self) -> bool:
        """Whether other processes need this one's share."""
        return not self.are_local or self.A.gathered or self.B.gathered


_LOCAL = Distributions()


@dataclass
class Job:
    """A pair, with its factors as they are now: whole, or this process's share of them in a shape to compute with.

    Where the factors themselves are out of reach, `reduced` holds their r×r matrices, (e, r, r).
    """

    pair: LoRAPair
    A: Tensor
    B: Tensor
    where: Distributions = _LOCAL
    reduced: PairTensors = _NONE
    roots_A: dict[float, Tensor] = field(default_factory=dict)  # exponent → (e, r, r)
    roots_B: dict[float, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return accurate_dtype(self.A.device)

    def split(self, tensors: PairTensors) -> PairTensors:
        """Views tensors of the parameters' shapes as (e, r, n) and (e, m, r), in the dtype to compute in."""
        return PairTensors(
            A=None if tensors.A is None else self.pair.split_A(tensors.A).to(self.dtype),
            B=None if tensors.B is None else self.pair.split_B(tensors.B).to(self.dtype),
        )

    def join(self, blocks: PairTensors, like: PairTensors | None = None) -> PairTensors:
        """Inverse of `split`, in the dtype and strides of the factors, or of other tensors of their shapes.

        Fused optimizers misread any other strides.
        """
        view = self.pair.blocks
        A, B = like or (self.A, self.B)
        return PairTensors(
            A=None if blocks.A is None or A is None else torch.empty_like(A).copy_(view.join_A(blocks.A, A.shape)),
            B=None if blocks.B is None or B is None else torch.empty_like(B).copy_(view.join_B(blocks.B, B.shape)),
        )

    def factors(self, before: PairTensors = _NONE) -> Factors:
        """The factors for a correction: their values `before` a step where these are given, else the present ones."""
        A = self.A.detach() if before.A is None else before.A
        B = self.B.detach() if before.B is None else before.B
        gone_A, gone_B = self.reduced
        return Factors(
            stored_A=self.pair.split_A(A) if gone_A is None else A.new_empty(*gone_A.shape[:2], 0),
            stored_B=self.pair.split_B(B) if gone_B is None else B.new_empty(len(gone_B), 0, gone_B.shape[-1]),
            scaling=self.pair.scaling,
            dtype=self.dtype,
            roots_A=self.roots_A,
            roots_B=self.roots_B,
        )

    def reduce(self, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """The factors' r×r matrices, (e, r, r) each: of this process's rows alone, where the factors are sharded."""
        if self.reduced.A is not None and self.reduced.B is not None:
            return self.reduced.A, self.reduced.B
        tall_A = self.pair.split_A(self.A.detach()).mT.to(self.dtype)  # (e, n, r)
        tall_B = self.pair.split_B(self.B.detach()).to(self.dtype)  # (e, m, r)
        E = self.pair.E
        if E is not None:
            # With a diagonal between them, each factor's gradient comes through the partner times the diagonal.
            diagonal = _whole(E).flatten().to(self.dtype)
            tall_A, tall_B = tall_A * diagonal, tall_B * diagonal
        return recipe.inverse_root.reduce(tall_A), recipe.inverse_root.reduce(tall_B)


def compute_roots(
    jobs: Sequence[Job], recipe: Recipe, along: Callable[[Tensor], Sequence[Part]] = lambda like: ()
) -> list[Tensor]:
    """Fills the jobs' roots: one batched call for each rank and device, whatever the factors' lengths.

    For factors whose rows lie on several processes there is one collective before, for each process group.

    Args:
        jobs: The pairs.
        recipe: The correction and how it is computed.
        along: Returns what else to add up over processes, in the same collective, given a tensor of its kind.

    Returns:
        The sums of these; none, if no root is needed.
    """
    exponents = recipe.correction.gram_exponents
    if not exponents or not jobs:
        return []
    wanted: list[dict[float, Tensor]] = []
    parts: list[Part] = []
    for job in jobs:
        for roots, where, matrices in zip((job.roots_A, job.roots_B), job.where, job.reduce(recipe), strict=True):
            wanted.append(roots)
            parts.append((where.sums, matrices))

    others = along(parts[0][1])
    if recipe.inverse_root.adds_up:
        reduced = add_up([*parts, *others])
        sums = [reduced.pop() for _ in others][::-1]
    else:
        reduced, sums = merge(parts, recipe.inverse_root.reduce), add_up(others)
    batches: dict[tuple[int, torch.device], list[tuple[dict[float, Tensor], Tensor]]] = defaultdict(list)
    for roots, matrices in zip(wanted, reduced, strict=True):
        batches[matrices.shape[-1], matrices.device].append((roots, matrices))

    for batch in batches.values():
        stacked = torch.cat([reduced for _, reduced in batch])  # (k, r, r)
        result = recipe.inverse_root.compute(stacked, exponents, recipe.damping)
        for exponent, powers in zip(exponents, result.roots, strict=True):
            parts_of = powers.split([len(reduced) for _, reduced in batch])
            for (roots, _), part in zip(batch, parts_of, strict=True):
                roots[exponent] = part
    return sums


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor.detach()  # pyright: ignore
