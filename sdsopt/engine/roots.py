"""The roots of many pairs at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sdsopt.engine.job import Job
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.stacks import stacks


class _Side(NamedTuple):
    """One factor of a job."""

    roots: dict[float, Tensor]  # where its roots belong: exponent → (e, r, r)
    factor: Tensor  # (e, d, r), or where it is wide (e, r, d)
    wide: bool


def compute_roots(jobs: Sequence[Job], recipe: Recipe) -> None:
    """Fills the jobs' roots: one batched call for each rank and device, whatever the factors' lengths."""
    exponents = recipe.exponents
    if not exponents:
        return
    # All factors are reduced to r×r matrices before any of these is decomposed.
    batches: dict[tuple[int, torch.device], list[tuple[_Side, Tensor]]] = defaultdict(list)
    for side, reduced in _reduce([side for job in jobs for side in _sides(job)], recipe):
        batches[reduced.shape[-1], reduced.device].append((side, reduced))

    for batch in batches.values():
        stacked = torch.cat([reduced for _, reduced in batch])  # (k, r, r)
        result = recipe.inverse_root.compute(stacked, exponents, recipe.damping)
        for exponent, powers in zip(exponents, result.roots, strict=True):
            parts = powers.split([len(reduced) for _, reduced in batch])
            for (side, _), part in zip(batch, parts, strict=True):
                side.roots[exponent] = part


def _sides(job: Job) -> tuple[_Side, _Side]:
    factors = job.present
    if factors.stored_E is None:
        return _Side(job.roots_A, factors.stored_A, True), _Side(job.roots_B, factors.stored_B, False)
    return _Side(job.roots_A, factors.partner_A, True), _Side(job.roots_B, factors.partner_B, False)


def _reduce(sides: Sequence[_Side], recipe: Recipe) -> list[tuple[_Side, Tensor]]:
    """Returns each side with its matrices (e, r, r)."""
    result: list[tuple[_Side, Tensor]] = []
    for group in stacks(sides, lambda side: [side.factor], lambda side: side.wide):
        factors = group[0].factor if len(group) == 1 else torch.cat([side.factor for side in group])
        reduced = recipe.inverse_root.reduce(factors.mT if group[0].wide else factors)
        parts = [reduced] if len(group) == 1 else reduced.split(len(group[0].factor))
        result += zip(group, parts, strict=True)
    return result
