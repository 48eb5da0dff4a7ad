"""What an inverse root is, whatever the method that computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class RootStatus(IntEnum):
    """What became of one matrix of a batch (the entries of `RootResult.status`)."""

    OK = 0
    """The root was computed."""
    ZERO = 1
    """The matrix is zero: its root is defined as the identity."""
    NON_FINITE = 2
    """The matrix holds NaN or infinity: its root is filled with NaN."""
    FALLBACK = 3
    """The method failed on the matrix: its root is a multiple of the identity."""


class RootResult(NamedTuple):
    """Inverse roots of a batch of Gram matrices.

    Attributes:
        roots: One tensor (k, r, r) per requested exponent, in the order asked for.
        status: (k,) uint8 tensor of `RootStatus` values, on the matrices' device.
    """

    roots: tuple[Tensor, ...]
    status: Tensor


class InverseRoot(ABC):
    r"""Computes $(M + \delta\,\lambda_{\max}(M)\,I)^{-p}$ for Gram matrices $M = X^\top X$.

    The work is split in two, so that the expensive half runs once for a whole model: `reduce` turns each
    tall factor X into an r×r matrix, whatever X's length, and `compute` takes a stack of these.

    No method raises on non-finite input. Those that decompose wait for a device to say whether they succeeded.
    """

    @property
    def adds_up(self) -> bool:
        """Whether `reduce` of a factor is the sum of `reduce` of its row blocks, as for the Gram matrix XᵀX.

        Otherwise it must be the `reduce` of theirs, put on top of each other, as for the triangular factor of QR.
        """
        return True

    @abstractmethod
    def reduce(self, factor: Tensor) -> Tensor:
        """Reduces tall factors to what `compute` needs of them.

        Args:
            factor: (..., d, r), of any floating-point dtype.

        Returns:
            (..., r, r) in `accurate_dtype`: the Gram matrix squares the condition number.
        """

    @abstractmethod
    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        """Computes the damped inverse roots of a batch.

        Args:
            reduced: (k, r, r), as returned by `reduce`.
            exponents: The powers p ≠ 0; the result holds $M^{-p}$ for each.
            damping: Relative damping δ ≥ 0, dimensionless: δ·λmax(M) is added to the eigenvalues.

        Returns:
            The roots and a status for each matrix. A zero matrix gives the identity; a non-finite one, NaN.
        """
