"""A correction together with the numerics it is computed with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sdsopt.corrections import Correction, KeepNorm, TrackBasis, make_correction
from sdsopt.errors import UnsupportedCorrectionError
from sdsopt.linalg import InverseRoot, make_inverse_root
from sdsopt.options import require_integer, require_number


@dataclass(frozen=True)
class Recipe:
    """What is done to the gradients of every pair.

    Attributes:
        correction: The correction.
        inverse_root: The method for the roots of the Gram matrices.
        damping: Relative damping δ ≥ 0.
        max_workspace_bytes: The memory to compute with at a time; None for as much as the device likes.
        update_every: For how many steps roots serve.
    """

    correction: Correction
    inverse_root: InverseRoot
    damping: float
    max_workspace_bytes: int | None = None
    update_every: int = 1

    @property
    def exponents(self) -> tuple[float, ...]:
        """The powers to compute: those for the gradients and, where moments are to follow the bases, for these."""
        p = self.correction.basis_exponent
        for_bases = {p, 1 - p} if self.tracks_bases and p is not None else set[float]()
        return tuple(sorted({*self.correction.gram_exponents, *for_bases} - {0}))

    @property
    def by_rows(self) -> bool:
        """Whether sharded factors can be corrected where they lie; otherwise they are gathered."""
        correction = self.correction
        mapped = not correction.uses_updates or correction.postcondition_rows() is not None
        return mapped and correction.precondition_rows() is not None

    @property
    def tracks_bases(self) -> bool:
        """Whether anything happens to moments between the steps."""
        return self.correction.carries_moments or self.correction.rebalance_every is not None

    @property
    def counts_steps(self) -> bool:
        """Whether the number of steps has to be remembered."""
        scheduled = self.correction.rebalance_every is not None or self.update_every > 1
        return self.correction.uses_step or scheduled

    @classmethod
    def of(
        cls,
        correction: str | Correction,
        damping: float,
        inverse_root: str | InverseRoot,
        rescale: Literal["grad_norm"] | None = None,
        transport: Literal["moments"] | None = None,
        rebalance_every: int | None = None,
        max_workspace_bytes: int | None = None,
        update_every: int = 1,
    ) -> Recipe:
        """Makes a recipe of a user's options.

        Raises:
            TypeError: `damping` is no number, or `rebalance_every`, `max_workspace_bytes` or `update_every` no integer.
            UnknownCorrectionError: No correction has that name.
            UnsupportedCorrectionError: The correction has no bases that moments could follow, or none of the roots that
                `update_every` is about, or needs them in every step.
            ValueError: `damping` is negative or not finite, `rebalance_every`, `max_workspace_bytes` or `update_every`
                is below 1, or `inverse_root`, `rescale` or `transport` is unknown.
        """
        require_number("damping", damping, "a finite number ≥ 0", lambda d: math.isfinite(d) and d >= 0)
        if rescale not in (None, "grad_norm"):
            raise ValueError(f'rescale must be "grad_norm" or None, got {rescale!r}')
        if transport not in (None, "moments"):
            raise ValueError(f'transport must be "moments" or None, got {transport!r}')
        if max_workspace_bytes is not None:
            wanted = "a positive integer such as 2**30, or None for no bound"
            require_integer("max_workspace_bytes", max_workspace_bytes, wanted, lambda size: size >= 1)
        wanted = "a whole number of steps ≥ 1, after which roots are computed anew"
        require_integer("update_every", update_every, wanted, lambda steps: steps >= 1)
        correction = make_correction(correction)
        if rescale is not None:
            correction = KeepNorm(correction)
        if transport is not None or rebalance_every is not None:
            correction = TrackBasis(correction, transport is not None, rebalance_every)
        recipe = cls(correction, make_inverse_root(inverse_root), damping, max_workspace_bytes, update_every)
        if update_every > 1:
            _require_reusable(recipe)
        return recipe


def _require_reusable(recipe: Recipe) -> None:
    if not recipe.exponents:
        raise UnsupportedCorrectionError(
            f"{recipe.correction} computes no roots of Gram matrices, so update_every changes nothing; leave it out"
        )
    if recipe.tracks_bases:
        raise UnsupportedCorrectionError(
            f"{recipe.correction} takes moments from one step's bases to the next one's, for which it needs the roots "
            "of every step; leave out update_every, or what moves moments (transport, rebalance_every)"
        )
