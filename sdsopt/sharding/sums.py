"""Sums over processes, many in one collective."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sdsopt.sharding.group import Group

Parts = Sequence[tuple[Sequence[Group], Tensor]]


def add_up(parts: Parts) -> list[Tensor]:
    """Adds tensors up over processes, with one all-reduce for each group.

    Args:
        parts: Each with the groups to sum over, one after the other; none leaves the tensor as it is. Tensors that
            share a group share dtype and device. Every process lists the same ones in the same order.

    Returns:
        The sums, the same on every process.
    """
    sums = [part for _, part in parts]
    for group, members in _members(parts):
        buffer = group.to_wire(torch.cat([sums[i].flatten() for i in members]))
        dist.all_reduce(buffer, group=group.process_group)
        _put_back(sums, members, buffer.to(sums[members[0]].device))
    return sums


def merge(parts: Parts, reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Reduces matrices of which each process has reduced its own rows, with one all-gather for each group.

    Args:
        parts: As for `add_up`; tensors (…, r, r).
        reduce: Reduces (…, w·r, r), the processes' matrices on top of each other, to (…, r, r).
    """
    merged = [part for _, part in parts]
    for group, members in _members(parts):
        buffer = group.to_wire(torch.cat([merged[i].flatten() for i in members]))
        gathered = [torch.empty_like(buffer) for _ in range(group.size)]
        dist.all_gather(gathered, buffer, group=group.process_group)
        by_process: list[list[Tensor]] = []
        for one in gathered:
            local = list(merged)
            _put_back(local, members, one.to(merged[members[0]].device))
            by_process.append(local)
        for i in members:
            merged[i] = reduce(torch.cat([local[i] for local in by_process], dim=-2))
    return merged


def _members(parts: Parts) -> Iterable[tuple[Group, list[int]]]:
    """Which tensors belong to a group, in the order in which the groups first occur."""
    groups = dict.fromkeys(group for groups, _ in parts for group in groups)
    return [(group, [i for i, (groups, _) in enumerate(parts) if group in groups]) for group in groups]


def _put_back(tensors: list[Tensor], members: Sequence[int], buffer: Tensor) -> None:
    pieces = buffer.split([tensors[i].numel() for i in members])
    for i, piece in zip(members, pieces, strict=True):
        tensors[i] = piece.reshape(tensors[i].shape)
