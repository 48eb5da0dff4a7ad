"""One pair's tensors while they are computed with."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from sdsopt.corrections import NO_MEMORY, Factors, Memory, PairTensors
from sdsopt.engine.places import HERE, Places
from sdsopt.linalg import accurate_dtype, empty_result
from sdsopt.pairs import LoRAPair
from sdsopt.sharding import whole

_NONE = PairTensors(None, None)


@dataclass
class Job:
    """A pair, with its factors as they are now: the parameters, or this process's share of sharded ones.

    Where the factors themselves are out of reach, `reduced` holds their r×r matrices (e, r, r) in their place.
    """

    pair: LoRAPair
    A: Tensor
    B: Tensor
    step: int = 0  # how many were taken before
    where: Places = HERE
    reduced: PairTensors = _NONE
    roots_A: dict[float, Tensor] = field(default_factory=dict)  # exponent → (e, r, r)
    roots_B: dict[float, Tensor] = field(default_factory=dict)
    memory: Memory = NO_MEMORY  # of the correction; after it has seen the gradients, the new one

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to compute in, where the correction does not keep the stored one."""
        return accurate_dtype(self.A.device)

    def split(self, tensors: PairTensors) -> PairTensors:
        """Views tensors of the parameters' shapes as (e, r, n) and (e, m, r)."""
        return PairTensors(
            A=None if tensors.A is None else self.pair.split_A(tensors.A),
            B=None if tensors.B is None else self.pair.split_B(tensors.B),
        )

    def join(self, blocks: PairTensors, given: PairTensors) -> PairTensors:
        """Inverse of `split`: in the dtypes given, and the parameters' own strides, as fused optimizers misread others.

        A gradient has its parameter's dtype unless that has a `grad_dtype`.
        """
        view = self.pair.blocks
        return PairTensors(
            A=None if blocks.A is None else _stored_like(self.A, view.join_A(blocks.A, self.A.shape), given.A),
            B=None if blocks.B is None else _stored_like(self.B, view.join_B(blocks.B, self.B.shape), given.B),
        )

    @cached_property
    def scaling(self) -> float:
        """That of the pair; the same throughout a step."""
        return self.pair.scaling

    @cached_property
    def present(self) -> Factors:
        """The factors as they are, with the roots as soon as these are computed."""
        return self.factors(_NONE)

    def factors(self, before: PairTensors) -> Factors:
        """The factors for a correction: their values `before` a step where these are given, else the present ones."""
        A, B = self.stored(before)
        return Factors(
            stored_A=A,
            stored_B=B,
            scaling=self.scaling,
            dtype=self.dtype,
            roots_A=self.roots_A,
            roots_B=self.roots_B,
            stored_E=self._diagonal,
            step=self.step,
        )

    def stored(self, before: PairTensors) -> tuple[Tensor, Tensor]:
        """The factors as (e, r, n) and (e, m, r): their values `before` a step where these are given."""
        A, B = self._blocks
        return (
            A if before.A is None else self.pair.split_A(before.A),
            B if before.B is None else self.pair.split_B(before.B),
        )

    @property
    def partners(self) -> tuple[Tensor, Tensor]:
        """What gB came through (e, r, n), and what gA came through (e, m, r)."""
        return self._blocks if self._diagonal is None else (self.present.partner_A, self.present.partner_B)

    @cached_property
    def _blocks(self) -> tuple[Tensor, Tensor]:
        return self.pair.split_A(self.A.detach()), self.pair.split_B(self.B.detach())

    @cached_property
    def _diagonal(self) -> Tensor | None:
        E = self.pair.E
        return None if E is None else whole(E.detach())


def _stored_like(factor: Tensor, tensor: Tensor, given: Tensor | None) -> Tensor:
    dtype = factor.dtype if given is None else given.dtype
    # Compiled, a copy: torch 2.13 fails to compare strides that are symbolic, as they are after a correction that it
    # cannot compile as a whole.
    if not torch.compiler.is_compiling() and tensor.dtype == dtype and tensor.stride() == factor.stride():
        return tensor
    return empty_result(factor, dtype).copy_(tensor)
