"""One pair's tensors while they are computed with, and the roots of many pairs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
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
    """A pair, with its factors as they are now: whole, or this process's share of them in a shape to compute with."""

    pair: LoRAPair
    A: Tensor
    B: Tensor
    where: Distributions = _LOCAL
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

    def join(self, blocks: PairTensors) -> PairTensors:
        """Inverse of `split`, in the factors' own dtype and strides: fused optimizers misread any other."""
        view = self.pair.blocks
        return PairTensors(
            A=None if blocks.A is None else torch.empty_like(self.A).copy_(view.join_A(blocks.A, self.A.shape)),
            B=None if blocks.B is None else torch.empty_like(self.B).copy_(view.join_B(blocks.B, self.B.shape)),
        )

    def factors(self, before: PairTensors = _NONE) -> Factors:
        """The factors for a correction: their values `before` a step where these are given, else the present ones."""
        A = self.A.detach() if before.A is None else before.A
        B = self.B.detach() if before.B is None else before.B
        return Factors(
            stored_A=self.pair.split_A(A),
            stored_B=self.pair.split_B(B),
            scaling=self.pair.scaling,
            dtype=self.dtype,
            roots_A=self.roots_A,
            roots_B=self.roots_B,
        )


def compute_roots(jobs: Sequence[Job], recipe: Recipe) -> None:
    """Fills the jobs' roots: one batched call for each rank and device, whatever the factors' lengths.

    For factors whose rows lie on several processes there is one collective before, for each process group.
    """
    exponents = recipe.correction.gram_exponents
    if not exponents:
        return
    wanted: list[dict[float, Tensor]] = []
    parts: list[tuple[tuple[Group, ...], Tensor]] = []
    for job in jobs:
        A, B = job.A.detach(), job.B.detach()
        E = job.pair.E
        for roots, tall, where in (
            (job.roots_A, job.pair.split_A(A).mT, job.where.A),
            (job.roots_B, job.pair.split_B(B), job.where.B),
        ):
            # With a diagonal between them, each factor's gradient comes through the partner times the diagonal.
            weighed = tall.to(job.dtype) if E is None else tall.to(job.dtype) * _whole(E).flatten().to(job.dtype)
            wanted.append(roots)
            parts.append((where.sums, recipe.inverse_root.reduce(weighed)))  # (e, d, r) → (e, r, r)

    reduced = add_up(parts) if recipe.inverse_root.adds_up else merge(parts, recipe.inverse_root.reduce)
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


def _whole(tensor: Tensor) -> Tensor:
    return tensor.detach().full_tensor() if is_distributed(tensor) else tensor.detach()  # pyright: ignore
