"""Grids that grow where the best learning rate is an edge: beyond it there may be a better one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from sdsopt.compare.grid import Grids, Series


def widened(grids: Grids, losses: Mapping[Series, Sequence[float]]) -> Grids:
    """Adds one learning rate to every method of an inner optimizer and rank in which some method's best is an edge.

    Every method, so that all keep equal budgets: one whose best is inside gets its rate at the better of its two ends.
    Grids of a single rate, which have no spacing, stay.

    Args:
        grids: The learning rates so far, rising.
        losses: The mean final loss at each of them; infinite where a seed diverged.

    Returns:
        The wider grids; equal to `grids` where no best rate is an edge.
    """
    together: dict[tuple[str, int], list[Series]] = defaultdict(list)
    for series in grids:
        together[series.inner.name, series.rank].append(series)
    result = dict(grids)
    for members in together.values():
        if any(_edge(losses[series]) for series in members):
            for series in members:
                result[series] = _with_one_more(grids[series], losses[series])
    return result


def _edge(losses: Sequence[float]) -> str | None:
    """Returns "low" or "high" where the best rate is that end. Where all diverged, only smaller rates can help."""
    if len(losses) == 1:
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    if best == 0 or not math.isfinite(losses[best]):
        return "low"
    return "high" if best == len(losses) - 1 else None


def _with_one_more(grid: tuple[float, ...], losses: Sequence[float]) -> tuple[float, ...]:
    if len(grid) == 1:
        return grid
    end = _edge(losses) or ("low" if losses[0] < losses[-1] else "high")
    if end == "low":
        return _rounded(grid[0] ** 2 / grid[1]), *grid
    return *grid, _rounded(grid[-1] ** 2 / grid[-2])


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")  # rates are part of a run's identity on disk
