"""Statistics of a sweep. Pure: records in, rows out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from sdsopt.compare.difference import Difference, paired_difference
from sdsopt.compare.methods import FULL, LORA
from sdsopt.compare.records import Record, final_loss

_WITHIN = 1.10  # "as good as the best"
_NOISE = 2.0  # standard errors that a gap must exceed


@dataclass(frozen=True)
class Stat:
    """Mean and sample standard deviation over seeds; std is NaN for a single seed."""

    mean: float
    std: float
    count: int

    @property
    def standard_error(self) -> float:
        """Of the mean."""
        return self.std / math.sqrt(self.count)


@dataclass(frozen=True)
class Cell:
    """One method at one learning rate."""

    lr: float
    loss: Stat  # infinite where a seed diverged
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Row:
    """One method with one inner optimizer at one rank, over its learning rates.

    Attributes:
        inner: The inner optimizer.
        rank: The rank; that of the comparison for full fine-tuning too.
        method: The method.
        cells: By rising learning rate.
        best: The cell of lowest mean final train loss; None where every rate diverged.
        at_edge: "low" or "high" where the best rate is the end of its grid, so that a better one may lie outside.
        accuracy: Held-out accuracy at the best rate.
        gap_closed: Share of plain LoRA's gap to full fine-tuning that is closed, and its standard error. None where
            there is no gap beyond noise.
        difference: To plain LoRA at its own best rate; None where that is not known, or diverged.
        lr_range: Highest over lowest rate of the unbroken range around the best in which the mean loss is within
            10 % of the best.
        range_open: Whether that range ends at the grid's end, so that it is a lower bound.
        diverged: Number of runs that diverged.
    """

    inner: str
    rank: int
    method: str
    cells: tuple[Cell, ...]
    best: Cell | None
    at_edge: str | None
    accuracy: Stat | None
    gap_closed: tuple[float, float] | None
    difference: Difference | None
    lr_range: float | None
    range_open: bool
    diverged: int


def row_to_json(row: Row, step_time: float | None) -> dict[str, Any]:
    """Returns a row's numbers as plain JSON types: None where one is not finite, or is not known.

    Args:
        row: The row.
        step_time: Time of a step, relative to plain LoRA.
    """
    return {
        "inner": row.inner,
        "rank": row.rank,
        "method": row.method,
        "best_lr": None if row.best is None else row.best.lr,
        "best_lr_at_edge": row.at_edge,
        "train_loss": None if row.best is None else _stat_to_json(row.best.loss),
        "accuracy": None if row.accuracy is None else _stat_to_json(row.accuracy),
        "gap_closed": None if row.gap_closed is None else dict(zip(("mean", "error"), row.gap_closed, strict=True)),
        "difference_to_lora": None if row.difference is None else _difference_to_json(row.difference),
        "lr_range": row.lr_range,
        "lr_range_is_lower_bound": row.range_open,
        "diverged_runs": row.diverged,
        "step_time": step_time,
        "learning_rates": [{"lr": cell.lr, **_stat_to_json(cell.loss)} for cell in row.cells],
    }


def _difference_to_json(difference: Difference) -> dict[str, Any]:
    return {**asdict(difference), "verdict": difference.verdict}


def _stat_to_json(stat: Stat) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in asdict(stat).items()}


def make_stat(values: Sequence[float]) -> Stat:
    """Returns the statistics of at least one value."""
    if not all(map(math.isfinite, values)):
        return Stat(math.inf, math.nan, len(values))
    return Stat(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))


def summarise(records: Iterable[Record]) -> list[Row]:
    """Returns a row for each inner optimizer, rank and method, in the order of their first records."""
    grouped: dict[tuple[str, int], dict[str, dict[float, list[Record]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        grouped[record.inner, record.rank][record.method][record.lr].append(record)
    # All ranks of an inner optimizer together, optimizers in the order they came.
    inners = list(dict.fromkeys(inner for inner, _ in grouped))
    ordered = sorted(grouped, key=lambda names: inners.index(names[0]))
    return [row for inner, rank in ordered for row in _section(inner, rank, grouped[inner, rank])]


def _section(inner: str, rank: int, grids: Mapping[str, Mapping[float, list[Record]]]) -> list[Row]:
    cells = {
        method: tuple(
            Cell(lr, make_stat([final_loss(record) for record in found]), tuple(found))
            for lr, found in sorted(by_lr.items())
        )
        for method, by_lr in grids.items()
    }
    best = {method: _best(row) for method, row in cells.items()}
    return [_row(inner, rank, method, row, best) for method, row in cells.items()]


def gap_closed(lora: Cell, full: Cell, method: Cell) -> tuple[float, float] | None:
    """Returns (lora − method)/(lora − full) with its standard error; None where lora − full is not beyond noise.

    Seed by seed: a seed gives every method the same fresh parameters and batches, so much of its luck cancels. The
    error is that of the numerator.
    """
    gap, gained = _advantage(full, lora), _advantage(method, lora)
    if not gap.mean > _NOISE * gap.standard_error or not math.isfinite(gained.mean):  # NaN of a single seed: no claim
        return None
    return gained.mean / gap.mean, gained.standard_error / gap.mean


def difference(lora: Cell, method: Cell) -> Difference | None:
    """Returns the paired difference of two methods' final losses, over the seeds that both have."""
    losses = {record.seed: final_loss(record) for record in lora.records}
    both = [record for record in method.records if record.seed in losses]
    return paired_difference([final_loss(record) for record in both], [losses[record.seed] for record in both])


def _advantage(method: Cell, baseline: Cell) -> Stat:
    """Statistics of the baseline's loss minus the method's, over the seeds that both have."""
    losses = {record.seed: final_loss(record) for record in method.records}
    return make_stat([final_loss(r) - losses[r.seed] for r in baseline.records if r.seed in losses])


def _best(cells: Sequence[Cell]) -> Cell | None:
    finite = [cell for cell in cells if math.isfinite(cell.loss.mean)]
    return min(finite, key=lambda cell: cell.loss.mean, default=None)


def _row(inner: str, rank: int, method: str, cells: tuple[Cell, ...], bests: Mapping[str, Cell | None]) -> Row:
    diverged = sum(record.diverged for cell in cells for record in cell.records)
    best = bests[method]
    if best is None:
        return Row(inner, rank, method, cells, None, None, None, None, None, None, False, diverged)

    at = cells.index(best)
    low = high = at
    while low > 0 and _as_good(cells[low - 1], best):
        low -= 1
    while high < len(cells) - 1 and _as_good(cells[high + 1], best):
        high += 1
    lora, full = bests.get(LORA.name), bests.get(FULL.name)
    accuracies = [record.accuracy for record in best.records if record.accuracy is not None]
    return Row(
        inner=inner,
        rank=rank,
        method=method,
        cells=cells,
        best=best,
        at_edge=None if len(cells) == 1 else "low" if at == 0 else "high" if at == len(cells) - 1 else None,
        accuracy=make_stat(accuracies) if accuracies else None,
        gap_closed=gap_closed(lora, full, best) if lora and full else None,
        difference=difference(lora, best) if lora and method != LORA.name else None,
        lr_range=cells[high].lr / cells[low].lr,
        range_open=low == 0 or high == len(cells) - 1,
        diverged=diverged,
    )


def _as_good(cell: Cell, best: Cell) -> bool:
    return cell.loss.mean <= _WITHIN * best.loss.mean
