"""The roots of many pairs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdsopt.engine.job import Job
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.stacks import stacks
from sdsopt.sharding import Group, add_up, merge

Part = tuple[tuple[Group, ...], Tensor]  # what to add up over which processes
_Batch = list[tuple[dict[float, Tensor], Tensor]]  # r×r matrices (e, r, r), and where their roots belong

_COPIES = 10  # of its matrices, while a batch is decomposed


class _Side(NamedTuple):
    """One factor of a job."""

    roots: dict[float, Tensor]  # where its roots belong: exponent → (e, r, r)
    factor: Tensor  # (e, d, r), or where it is wide (e, r, d)
    wide: bool
    sums: tuple[Group, ...]  # over which its rows are cut


def compute_roots(
    jobs: Sequence[Job], recipe: Recipe, along: Callable[[Tensor], Sequence[Part]] = lambda like: ()
) -> list[Tensor]:
    """Fills the jobs' roots: one batched call for each rank and device, whatever the factors' lengths.

    For factors whose rows lie on several processes there is one collective before, for each process group.

    Args:
        jobs: The pairs.
        recipe: The correction and how it is computed.
        along: Returns what else to add up over processes, in the same collective, given a tensor of its kind.

    Returns:
        The sums of that; none, if no root is needed.
    """
    exponents = recipe.exponents
    if not exponents or not jobs:
        return []
    # All factors are reduced to r×r matrices before any of these is decomposed.
    sides = [side for job in jobs if job.reduced.A is None for side in _sides(job)]
    reduced = _reduce(sides, recipe)
    parts = [(side.sums, matrices) for side, matrices in reduced]
    others = list(along(parts[0][1])) if parts else []
    if recipe.inverse_root.adds_up:
        total = add_up([*parts, *others])
        matrices, sums = total[: len(parts)], total[len(parts) :]
    else:
        matrices, sums = merge(parts, recipe.inverse_root.reduce), add_up(others)

    batches: dict[tuple[int, torch.device], _Batch] = defaultdict(list)
    for roots, matrix in [*zip((side.roots for side, _ in reduced), matrices, strict=True), *_given(jobs)]:
        batches[matrix.shape[-1], matrix.device].append((roots, matrix))
    for batch in _bounded(batches.values(), recipe.max_workspace_bytes):
        stacked = torch.cat([matrix for _, matrix in batch])  # (k, r, r)
        result = recipe.inverse_root.compute(stacked, exponents, recipe.damping)
        for exponent, powers in zip(exponents, result.roots, strict=True):
            of_each = powers.split([len(matrix) for _, matrix in batch])
            for (roots, _), part in zip(batch, of_each, strict=True):
                roots[exponent] = part
    return sums


def _bounded(batches: Iterable[_Batch], max_workspace_bytes: int | None) -> Iterator[_Batch]:
    """Cuts batches that would take more memory than there may be; those of one factor stay."""
    for batch in batches:
        if max_workspace_bytes is None:
            yield batch
            continue
        largest = max(matrix.numel() * matrix.element_size() for _, matrix in batch)
        size = max(1, max_workspace_bytes // (_COPIES * largest))
        yield from (batch[start : start + size] for start in range(0, len(batch), size))


def _given(jobs: Sequence[Job]) -> _Batch:
    """The matrices of factors that are out of reach."""
    both = [pair for job in jobs for pair in zip((job.roots_A, job.roots_B), job.reduced, strict=True)]
    return [(roots, matrix) for roots, matrix in both if matrix is not None]


def _sides(job: Job) -> tuple[_Side, _Side]:
    wide, tall = job.partners
    return _Side(job.roots_A, wide, True, job.where.A.sums), _Side(job.roots_B, tall, False, job.where.B.sums)


def _reduce(sides: Sequence[_Side], recipe: Recipe) -> list[tuple[_Side, Tensor]]:
    """Returns each side with its matrices (e, r, r), in the order of the sides, which all processes have in common."""
    result: list[tuple[_Side, Tensor]] = []
    for group in stacks(sides, lambda side: [side.factor], lambda side: side.wide, recipe.max_workspace_bytes):
        factors = group[0].factor if len(group) == 1 else torch.cat([side.factor for side in group])
        reduced = recipe.inverse_root.reduce(factors.mT if group[0].wide else factors)
        parts = [reduced] if len(group) == 1 else reduced.split(len(group[0].factor))
        result += zip(group, parts, strict=True)
    # In the order of the sides again: shards of one factor may differ in length, and their stacks from those of others.
    by_side = {id(side.roots): (side, matrices) for side, matrices in result}
    return [by_side[id(side.roots)] for side in sides]
