"""A correction in the form in which it can be computed on shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, final

from sdsopt.corrections.base import Factors, PairTensors


class Lengths(NamedTuple):
    """Frobenius norms of whole matrices, block by block: (e, 1, 1) each.

    Attributes:
        factors: Those of A and B before the step.
        raw: Those of the gradients, or updates, as they came; None where one is missing.
        mapped: Those after `RowMap.map`; None likewise.
    """

    factors: PairTensors
    raw: PairTensors
    mapped: PairTensors


@final
@dataclass(frozen=True)
class RowMap:
    """A map of gradients or updates that treats each row of B's, and each column of A's, by itself.

    Beyond that each matrix may be multiplied by a number, which depends on lengths of whole matrices. So a process
    that holds some of the rows needs only these few numbers from the others.

    Attributes:
        map: The map; of the factors it reads `roots_A` and `roots_B` alone, which are those of the whole ones.
        scale: Returns the numbers, (e, 1, 1), given the lengths; None for none.
    """

    map: Callable[[Factors, PairTensors], PairTensors]
    scale: Callable[[Lengths], PairTensors] | None = None
