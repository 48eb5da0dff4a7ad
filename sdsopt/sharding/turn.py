"""From a matrix that is cut across its rows to one that is cut across its columns, and back, by all-to-all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from sdsopt.sharding.group import Group


@final
@dataclass(frozen=True)
class Turn:
    """Turns a matrix (rows, columns), of which each process holds some rows, so that each holds some columns.

    It takes 1/w of the bytes of a gather to w processes. The rows are cut as by `torch.chunk`, some processes may have
    none. The columns are cut evenly, with columns of zeros added at the end to make that possible.

    Attributes:
        group: The processes.
        rows: The number of all rows.
    """

    group: Group
    rows: int

    def rows_of(self, rank: int) -> int:
        """The number of rows that a process holds."""
        chunk = -(-self.rows // self.group.size)
        return min(max(self.rows - rank * chunk, 0), chunk)

    def columns(self, columns: int) -> int:
        """The number of columns that each process gets of this many."""
        return -(-columns // self.group.size)


Matrices = Sequence[tuple[Turn, Tensor]]


def turn(matrices: Matrices) -> list[Tensor]:
    """Turns many matrices, with one all-to-all for each group and dtype.

    Args:
        matrices: Each with this process's rows (r_i, n); every process lists the same ones in the same order.

    Returns:
        This process's columns of each, (r, ⌈n/w⌉).
    """
    return _by_bucket(matrices, _turn)


def turn_back(matrices: Matrices) -> list[Tensor]:
    """Inverse of `turn`, but that the added columns are still there.

    Args:
        matrices: Each with this process's columns (r, c).

    Returns:
        This process's rows of each, (r_i, w·c).
    """
    return _by_bucket(matrices, _turn_back)


def _by_bucket(matrices: Matrices, function: Callable[[Group, Matrices], list[Tensor]]) -> list[Tensor]:
    buckets: dict[tuple[Group, torch.dtype], list[int]] = defaultdict(list)
    for index, (how, tensor) in enumerate(matrices):
        buckets[how.group, tensor.dtype].append(index)
    results: list[Tensor | None] = [None] * len(matrices)
    for (group, _), indices in buckets.items():
        for index, result in zip(indices, function(group, [matrices[i] for i in indices]), strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def _by_rows(matrices: Matrices) -> dict[Turn, list[int]]:
    """Matrices with equally many rows are laid side by side and travel as one."""
    bands: dict[Turn, list[int]] = defaultdict(list)
    for index, (how, _) in enumerate(matrices):
        bands[how].append(index)
    return bands


def _turn(group: Group, matrices: Matrices) -> list[Tensor]:
    size, rank = group.size, group.rank
    bands = _by_rows(matrices)
    widths = [how.columns(tensor.shape[1]) for how, tensor in matrices]
    sent: list[Tensor] = []
    for members in bands.values():
        # (r_i, w, Σc): for each process, its columns of all matrices of the band
        side_by_side = torch.cat([_columns_apart(matrices[i][1], size, widths[i]) for i in members], dim=2)
        sent.append(side_by_side.transpose(0, 1).flatten(1))  # (w, r_i·Σc)
    band_widths = {how: sum(widths[i] for i in members) for how, members in bands.items()}
    sizes = [[how.rows_of(peer) * width for how, width in band_widths.items()] for peer in range(size)]
    received = _all_to_all(torch.cat(sent, dim=1), [sum(sizes[rank])] * size, list(map(sum, sizes)), group)

    results: list[Tensor] = [received] * len(matrices)
    # What a process sends is its rows of the first band, then of the second, …
    starts = list(accumulate(map(sum, sizes), initial=0))
    for band, (how, members) in enumerate(bands.items()):
        offsets = [start + sum(of_peer[:band]) for start, of_peer in zip(starts, sizes, strict=False)]
        parts = [received[o : o + of_peer[band]] for o, of_peer in zip(offsets, sizes, strict=True)]
        rows = torch.cat(parts).reshape(how.rows, band_widths[how])
        for i, columns in zip(members, rows.split([widths[i] for i in members], dim=1), strict=True):
            results[i] = columns
    return results


def _turn_back(group: Group, matrices: Matrices) -> list[Tensor]:
    size, rank = group.size, group.rank
    bands = _by_rows(matrices)
    side_by_side = {how: torch.cat([matrices[i][1] for i in members], dim=1) for how, members in bands.items()}
    rows = {how: band.split([how.rows_of(peer) for peer in range(size)]) for how, band in side_by_side.items()}
    sent = [torch.cat([rows[how][peer].flatten() for how in bands]) for peer in range(size)]
    own = [how.rows_of(rank) * band.shape[1] for how, band in side_by_side.items()]
    received = _all_to_all(torch.cat(sent), [len(part) for part in sent], [sum(own)] * size, group)

    results: list[Tensor] = [received] * len(matrices)
    for (how, members), part in zip(bands.items(), received.reshape(size, sum(own)).split(own, dim=1), strict=True):
        shape = (size, how.rows_of(rank), side_by_side[how].shape[1])
        columns = part.reshape(shape).transpose(0, 1)  # (r_i, w, Σc)
        widths = [matrices[i][1].shape[1] for i in members]
        for i, of_one in zip(members, columns.split(widths, dim=2), strict=True):
            results[i] = of_one.flatten(1)
    return results


def _columns_apart(matrix: Tensor, size: int, width: int) -> Tensor:
    """(r_i, n) → (r_i, w, c), with zeros at the end."""
    rows, columns = matrix.shape
    return pad(matrix, (0, width * size - columns)).reshape(rows, size, width)


def _all_to_all(sent: Tensor, input_sizes: list[int], output_sizes: list[int], group: Group) -> Tensor:
    on_wire = group.to_wire(sent.flatten())
    received = on_wire.new_empty(sum(output_sizes))
    dist.all_to_all_single(received, on_wire, output_sizes, input_sizes, group=group.process_group)
    return received.to(sent.device)
