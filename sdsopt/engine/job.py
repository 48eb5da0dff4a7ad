"""One pair's tensors while they are computed with, and the roots of many pairs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.corrections import Factors, PairTensors
from sdsopt.engine.recipe import Recipe
from sdsopt.linalg import accurate_dtype
from sdsopt.pairs import LoRAPair

_NONE = PairTensors(None, None)


@dataclass
class Job:
    """A pair, with its parameters as they are now."""

    pair: LoRAPair
    A: Parameter
    B: Parameter
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
        """Inverse of `split`, in the parameters' own dtype and strides: fused optimizers misread any other."""
        return PairTensors(
            A=None if blocks.A is None else torch.empty_like(self.A).copy_(self.pair.join_A(blocks.A)),
            B=None if blocks.B is None else torch.empty_like(self.B).copy_(self.pair.join_B(blocks.B)),
        )

    def factors(self, before: PairTensors = _NONE) -> Factors:
        """The factors for a correction: their values `before` a step where these are given, else the present ones."""
        A = self.A.detach() if before.A is None else before.A
        B = self.B.detach() if before.B is None else before.B
        E = self.pair.E
        return Factors(
            stored_A=self.pair.split_A(A),
            stored_B=self.pair.split_B(B),
            scaling=self.pair.scaling,
            dtype=self.dtype,
            roots_A=self.roots_A,
            roots_B=self.roots_B,
            stored_E=None if E is None else E.detach(),
        )


def compute_roots(jobs: Sequence[Job], recipe: Recipe) -> None:
    """Fills the jobs' roots: one batched call for each rank and device, whatever the factors' lengths."""
    exponents = recipe.correction.gram_exponents
    if not exponents:
        return
    batches: dict[tuple[int, torch.device], list[tuple[dict[float, Tensor], Tensor]]] = defaultdict(list)
    for job in jobs:
        factors = job.factors()
        for roots, tall in ((job.roots_A, factors.partner_A.mT), (job.roots_B, factors.partner_B)):
            reduced = recipe.inverse_root.reduce(tall)  # (e, d, r) → (e, r, r)
            batches[reduced.shape[-1], reduced.device].append((roots, reduced))

    for batch in batches.values():
        stacked = torch.cat([reduced for _, reduced in batch])  # (k, r, r)
        result = recipe.inverse_root.compute(stacked, exponents, recipe.damping)
        for exponent, powers in zip(exponents, result.roots, strict=True):
            parts = powers.split([len(reduced) for _, reduced in batch])
            for (roots, _), part in zip(batch, parts, strict=True):
                roots[exponent] = part
