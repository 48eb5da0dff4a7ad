"""The inverse-root method that suits the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from sdsopt.linalg.base import InverseRoot, RootResult
from sdsopt.linalg.eigh import EighInverseRoot
from sdsopt.linalg.newton_schulz import NewtonSchulzInverseRoot
from sdsopt.linalg.products import gram


@final
@dataclass(frozen=True)
class AutoInverseRoot(InverseRoot):
    """`EighInverseRoot` on a CPU, `NewtonSchulzInverseRoot` elsewhere.

    On a CPU eigh was 1.5 to 7 times as fast at every rank from 4 to 256 and every batch from 8 to 448
    (`benchmarks/roots.py`), so nothing is left to decide there. On a GPU eigh waits for the device to see whether it
    failed, which products of matrices never do; how the two compare there has not been measured.
    """

    def reduce(self, factor: Tensor) -> Tensor:
        """Forms the Gram matrix XᵀX, (..., d, r) → (..., r, r)."""
        return gram(factor)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        """Leaves Gram matrices (k, r, r) to the device's method; see `InverseRoot.compute`."""
        method = EighInverseRoot() if reduced.device.type == "cpu" else NewtonSchulzInverseRoot()
        return method.compute(reduced, exponents, damping)
