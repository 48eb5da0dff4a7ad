"""A correction together with the numerics it is computed with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sdsopt.corrections import Correction, KeepNorm, make_correction
from sdsopt.linalg import InverseRoot, make_inverse_root


@dataclass(frozen=True)
class Recipe:
    """What is done to the gradients of every pair.

    Attributes:
        correction: The correction.
        inverse_root: The method for the roots of the Gram matrices.
        damping: Relative damping δ ≥ 0.
    """

    correction: Correction
    inverse_root: InverseRoot
    damping: float

    @property
    def by_rows(self) -> bool:
        """Whether sharded factors can be corrected where they lie; otherwise they are gathered."""
        correction = self.correction
        mapped = not correction.uses_updates or correction.postcondition_rows() is not None
        return mapped and correction.precondition_rows() is not None

    @classmethod
    def of(
        cls,
        correction: str | Correction,
        damping: float,
        inverse_root: str | InverseRoot,
        rescale: Literal["grad_norm"] | None = None,
    ) -> Recipe:
        """Makes a recipe of a user's options.

        Raises:
            UnknownCorrectionError: No correction has that name.
            ValueError: `damping` is negative or not finite, or `inverse_root` or `rescale` is unknown.
        """
        if not (math.isfinite(damping) and damping >= 0):
            raise ValueError(f"damping must be a finite number ≥ 0, got {damping}")
        if rescale not in (None, "grad_norm"):
            raise ValueError(f'rescale must be "grad_norm" or None, got {rescale!r}')
        correction = make_correction(correction)
        if rescale is not None:
            correction = KeepNorm(correction)
        return cls(correction, make_inverse_root(inverse_root), damping)
