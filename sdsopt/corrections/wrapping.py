"""A correction that adds something to another one."""

from __future__ import annotations

from dataclasses import dataclass

from sdsopt.corrections.base import Correction, Factors, LearningRates, PairTensors
from sdsopt.corrections.row_map import RowMap


@dataclass(frozen=True)
class Wrapping(Correction):
    """Base of the corrections around a correction: in all that it does not override, as that one.

    Attributes:
        correction: The one inside.
    """

    correction: Correction

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        return self.correction.gram_exponents

    @property
    def uses_updates(self) -> bool:
        return self.correction.uses_updates

    @property
    def uses_learning_rates(self) -> bool:
        return self.correction.uses_learning_rates

    @property
    def uses_step(self) -> bool:
        return self.correction.uses_step

    @property
    def basis_exponent(self) -> float | None:
        return self.correction.basis_exponent

    @property
    def carries_moments(self) -> bool:
        return self.correction.carries_moments

    @property
    def rebalance_every(self) -> int | None:
        return self.correction.rebalance_every

    def precondition_rows(self) -> RowMap | None:
        return self.correction.precondition_rows()

    def postcondition_rows(self) -> RowMap | None:
        return self.correction.postcondition_rows()

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        return self.correction.postcondition(factors, updates, rates)
