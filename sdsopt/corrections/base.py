"""What a gradient correction is. Subclass `Correction` to write your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdsopt.linalg import copied

if TYPE_CHECKING:
    from sdsopt.corrections.row_map import RowMap


class PairTensors(NamedTuple):
    """One tensor for each factor of a batch of pairs: gradients, or updates.

    Attributes:
        A: (e, r, n), or None where A has no gradient (frozen, or unused in this step).
        B: (e, m, r), or None likewise.
    """

    A: Tensor | None
    B: Tensor | None

    def map(self, function: Callable[..., Tensor], *others: PairTensors) -> PairTensors:
        """Applies a function side by side: to A with the others' A, to B with the others' B; None stays None."""
        A, B = zip(self, *others, strict=True)
        return PairTensors(
            A=None if self.A is None else function(*A),
            B=None if self.B is None else function(*B),
        )

    def apart_from(self, given: PairTensors) -> PairTensors:
        """Copies what is the same tensor as in `given`: the identity hands that back, and optimizers write into it."""
        return PairTensors(
            *(copied(one) if one is not None and one is g else one for one, g in zip(self, given, strict=True))
        )


class Memory(NamedTuple):
    """What a correction remembers of the gradients of a batch of pairs, for each factor by name.

    Every tensor is (e, …). Empty before a factor's first step. It is kept in the parameter's dtype.

    Attributes:
        A: Of gA's.
        B: Of gB's.
    """

    A: Mapping[str, Tensor]
    B: Mapping[str, Tensor]


NO_MEMORY = Memory({}, {})


class LearningRates(NamedTuple):
    """The learning rates with which the inner optimizer stepped on a batch of pairs.

    Attributes:
        A: That of A's param group, a number or a tensor that broadcasts with (e, 1, 1); None where A did not step.
        B: That of B's param group, likewise.
    """

    A: float | Tensor | None
    B: float | Tensor | None


@dataclass(frozen=True)
class Factors:
    """The factors of e independent pairs of one shape, ΔW = scaling·B·A, before the step.

    The leading dimension is a batch: the experts of a mixture, the groups of a convolution, or several layers of
    one shape. A correction treats its entries independently.

    Attributes:
        stored_A: (e, r, n) in the parameter's own dtype.
        stored_B: (e, m, r) in the parameter's own dtype.
        scaling: LoRA's factor s (α/r, or α/√r with rsLoRA).
        dtype: The dtype to compute in; that of the gradients, unless the correction keeps the stored one.
        roots_A: M_A^(-p), (e, r, r), for each p of `Correction.gram_exponents`, with M_A = A·Aᵀ.
        roots_B: M_B^(-p), (e, r, r), likewise, with M_B = Bᵀ·B.
        stored_E: The diagonal of ΔW = scaling·B·diag(E)·A (AdaLoRA), r numbers; None for a plain product.
        step: How many steps were taken before; counted only where the correction `uses_step`.
    """

    stored_A: Tensor
    stored_B: Tensor
    scaling: float
    dtype: torch.dtype
    roots_A: Mapping[float, Tensor]
    roots_B: Mapping[float, Tensor]
    stored_E: Tensor | None = None
    step: int = 0

    # Converted on first use only: most corrections need the roots and never look at the factors.
    @cached_property
    def A(self) -> Tensor:
        """A (e, r, n) in `dtype`."""
        return self.stored_A.to(self.dtype)

    @cached_property
    def B(self) -> Tensor:
        """B (e, m, r) in `dtype`."""
        return self.stored_B.to(self.dtype)

    # The Gram matrices behind the roots are those of these two.

    @cached_property
    def partner_A(self) -> Tensor:
        """What gB came through, (e, r, n) in `dtype`: diag(E)·A, which is A in a plain product."""
        return self.A if self.stored_E is None else self.stored_E.flatten().to(self.dtype)[:, None] * self.A

    @cached_property
    def partner_B(self) -> Tensor:
        """What gA came through, (e, m, r) in `dtype`: B·diag(E), which is B in a plain product."""
        return self.B if self.stored_E is None else self.B * self.stored_E.flatten().to(self.dtype)


class Correction(ABC):
    """A pure transform of the gradients of LoRA pairs.

    It neither keeps state nor changes its arguments: what some need to remember they are given, and return. What it
    computes must commute with the batch dimension e.
    """

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        """The powers p ≠ 0 for which `Factors` shall hold M_A^(-p) and M_B^(-p); they are computed in one batch.

        A negative p gives a positive power: -1 the damped Gram matrix itself.
        """
        return ()

    @property
    def uses_updates(self) -> bool:
        """Whether `postcondition` does anything. It costs a copy of the LoRA parameters in each step."""
        return False

    @property
    def uses_learning_rates(self) -> bool:
        """Whether `postcondition` needs the learning rates. Optimizers that have none are then refused."""
        return False

    @property
    def linear_per_factor(self) -> bool:
        """Whether gA's correction is linear in gA, needs no gB and is never None, and the other way round.

        Hook mode (`sdsopt.attach`) needs that, since it sees one gradient of one micro-batch at a time.
        """
        return False

    @property
    def keeps_dtype(self) -> bool:
        """Whether it takes tensors in the dtype they are stored in, and returns them so.

        It must then see to the precision itself. Otherwise it is given gradients and updates in float64 where the
        device has it, and what it returns is rounded.
        """
        return False

    # Between steps. The engine does what these ask for. What has to be remembered goes where every kind of checkpoint
    # keeps it: a number of steps into the optimizer's param groups, and a `Memory` into its state.

    @property
    def uses_step(self) -> bool:
        """Whether `precondition` looks at `Factors.step`."""
        return False

    @property
    def basis_exponent(self) -> float | None:
        """The p for which corrected gradients are c·M_B^(-p)·gA and c·gB·M_A^(-p), with a number c; None without one.

        Then all that the inner optimizer gathers of them are coordinates in the bases B·M_B^(-p) and M_A^(-p)·A.
        """
        return None

    @property
    def carries_moments(self) -> bool:
        """Whether the inner optimizer's moments follow these bases from step to step. Needs a `basis_exponent`."""
        return False

    @property
    def rebalance_every(self) -> int | None:
        """After how many steps the factors are balanced, with the same product; None for never. Needs as much."""
        return None

    @property
    def keeps_memory(self) -> bool:
        """Whether `advance` remembers anything. Needs a `basis_exponent`, and factors in float32 or float64."""
        return False

    def advance(self, factors: Factors, gradients: PairTensors, memory: Memory) -> tuple[PairTensors, Memory]:
        """Corrects the gradients, as `precondition`, and returns with them what to remember for the next step.

        Args:
            factors: As for `precondition`.
            gradients: Likewise.
            memory: What the last step returned, in the present bases.

        Returns:
            The gradients, and the memory; that of a factor without a gradient is left out.
        """
        return self.precondition(factors, gradients), memory

    def carry(self, memory: Mapping[str, Tensor], change: Tensor) -> Mapping[str, Tensor]:
        """Returns what to remember of one factor in new bases.

        Args:
            memory: Its part of a `Memory`, of a correction that keeps one.
            change: (e, r, r), with which coordinates in the old basis, as columns, are multiplied from the left.
        """
        del change
        return memory

    # With sharded factors, each process computes on the rows that it has, where the correction says how.

    def precondition_rows(self) -> RowMap | None:
        """Returns `precondition` in a form for shards; None (default) if there is none.

        Factors that are sharded by FSDP2 or tensor parallelism are then gathered on every process.
        """
        return None

    def postcondition_rows(self) -> RowMap | None:
        """The same of `postcondition`."""
        return None

    @abstractmethod
    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Corrects the gradients before the inner optimizer sees them.

        Args:
            factors: The factors, and the roots of their Gram matrices.
            gradients: gA = s·BᵀG (e, r, n) and gB = s·G·Aᵀ (e, m, r); either may be None.

        Returns:
            Tensors of the same shapes. None where the input is None, and for a factor that shall make no step at all:
            the inner optimizer then passes it over, weight decay included.
        """

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        """Corrects the step that the inner optimizer took, without its decoupled weight decay.

        Args:
            factors: The factors as they were *before* the step.
            updates: δA (e, r, n) and δB (e, m, r); None for a factor that made no step.
            rates: The learning rates of the step.

        Returns:
            The updates to make instead; None where the input is None.
        """
        del factors, rates
        return updates
