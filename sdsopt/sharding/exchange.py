"""From what a process stores of a factor to what it computes with, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sdsopt.sharding.distribution import Distribution
from sdsopt.sharding.turn import turn, turn_back

Parts = Sequence[tuple[Distribution, Tensor]]


def spread(parts: Parts) -> list[Tensor]:
    """Makes whole what must be whole to compute with the factors: one all-to-all for all that is turned.

    What is gathered takes an all-gather each.

    Args:
        parts: This process's part of each factor, or of a tensor of its shape. Every process lists the same in the
            same order.

    Returns:
        What to compute with; a part itself where nothing is to be done.
    """
    results = [how.gather(part) if how.gathered else part for how, part in parts]
    turned = [(i, how, how.turn) for i, (how, _) in enumerate(parts) if how.turn is not None]
    columns = turn([(how_turned, how.to_rows(parts[i][1])) for i, how, how_turned in turned])
    for (i, how, _), matrix in zip(turned, columns, strict=True):
        results[i] = matrix if how.turned_axis == 0 else matrix.mT
    return results


def collect(parts: Parts) -> list[Tensor]:
    """Inverse of `spread`, with the same number of collectives for what is turned, and none for what is gathered.

    Args:
        parts: What was computed, in the shapes that `spread` gave.

    Returns:
        This process's part of each.
    """
    results = [how.cut(part) if how.gathered else part for how, part in parts]
    turned = [(i, how, how.turn) for i, (how, _) in enumerate(parts) if how.turn is not None]
    matrices = [(how_turned, parts[i][1] if how.turned_axis == 0 else parts[i][1].mT) for i, how, how_turned in turned]
    for (i, how, _), rows in zip(turned, turn_back(matrices), strict=True):
        results[i] = how.from_rows(rows)
    return results
