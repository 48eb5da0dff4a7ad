"""What happens to factors and moments after the inner optimizer has stepped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdsopt.corrections import Factors, PairTensors, basis_change
from sdsopt.engine.job import Job
from sdsopt.engine.memory import State, carry, keep, remembered
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.roots import compute_roots
from sdsopt.errors import UnsupportedCorrectionError
from sdsopt.linalg import balancing_transform
from sdsopt.pairs import LoRAPair
from sdsopt.sharding import is_distributed

_STEPS = "sdsopt_steps"  # a number in every param group: there all kinds of checkpoint keep it

ParamGroup = dict[str, Any]
# What the inner optimizer remembers of a parameter's gradients: first moments, and second ones.
MomentsOf = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]


def require_trackable(pairs: Sequence[LoRAPair], recipe: Recipe, owned: Collection[int]) -> None:
    """Refuses pairs whose moments cannot be carried, or whose factors cannot be balanced, where the recipe does so.

    Args:
        pairs: The pairs of which the optimizer owns a factor.
        recipe: What it shall do.
        owned: The ids of the parameters that it owns.

    Raises:
        UnsupportedCorrectionError: A pair has a trained diagonal between its factors, or is sharded; or factors are to
            be balanced, or memories to be kept, and are in half precision; or they are to be balanced, and one of each
            pair is frozen or another optimizer's.
    """
    if recipe.tracks_bases:
        for pair in pairs:
            if is_distributed(pair.A) or is_distributed(pair.B):
                raise UnsupportedCorrectionError(
                    f"the factors of {pair.name} are sharded (FSDP2 or tensor parallelism), and carrying moments or "
                    "rebalancing needs them whole; leave out transport and rebalance_every, or use another correction"
                )
            if pair.path_E is not None:
                raise UnsupportedCorrectionError(
                    f"{pair.name} has a trained diagonal between B and A (AdaLoRA), so its moments cannot be carried "
                    "and its factors not be rebalanced; leave out transport and rebalance_every, or use another "
                    "correction"
                )
    if recipe.correction.keeps_memory:
        _require_precision(pairs, f"{recipe.correction} would lose what it remembers", "use another correction")
    if recipe.correction.rebalance_every is None or not pairs:
        return
    _require_precision(pairs, "balanced factors would have another product", "leave out rebalance_every")
    if not any(_both_trained(pair.A, pair.B, owned) for pair in pairs):
        raise UnsupportedCorrectionError(
            "rebalance_every changes both factors of a pair, and this optimizer trains at most one of each; "
            f"the first is {pairs[0].name}"
        )


def require_partners(jobs: Iterable[Job], recipe: Recipe, owned: Collection[int]) -> None:
    """Refuses to carry moments of a factor whose partner is another optimizer's. At a step: groups may be added later.

    Args:
        jobs: The pairs of which the optimizer steps on a factor.
        recipe: What it shall do.
        owned: The ids of the parameters that it owns.

    Raises:
        UnsupportedCorrectionError: There is such a factor.
    """
    if not recipe.correction.carries_moments:
        return
    for job in jobs:
        if any(factor.requires_grad and id(factor) not in owned for factor in (job.A, job.B)):
            raise UnsupportedCorrectionError(
                f"this optimizer trains one factor of {job.pair.name} and another one the other, so neither sees how "
                "both bases change, and moments cannot follow them; give one optimizer both factors (in groups of "
                "their own, if need be), freeze the factor that nobody trains, or leave out transport"
            )


def _require_precision(pairs: Sequence[LoRAPair], otherwise: str, way_out: str) -> None:
    for pair in pairs:
        for factor in (pair.A, pair.B):
            if factor.dtype not in (torch.float32, torch.float64):
                raise UnsupportedCorrectionError(
                    f"{pair.name} is stored in {factor.dtype}, in which {otherwise} by rounding; train the adapter in "
                    f"float32, or {way_out}"
                )


def steps_taken(param_groups: Iterable[ParamGroup]) -> int:
    """Returns how many steps were counted, in this run and in those that it resumes."""
    return max((int(group.get(_STEPS, 0)) for group in param_groups), default=0)


def finish_step(
    taken: Sequence[tuple[Job, PairTensors]],
    recipe: Recipe,
    param_groups: Sequence[ParamGroup],
    moments_of: MomentsOf,
    state: State,
) -> None:
    """Counts the step, keeps memories, lets moments follow the factors, and balances these where it is time.

    Args:
        taken: The pairs as they were before the step, with their roots, and the values of the factors that stepped.
        recipe: What to do.
        param_groups: The optimizer's groups, where the count is kept.
        moments_of: Finds the moments of a parameter.
        state: The optimizer's state, where memories are kept.
    """
    correction, every = recipe.correction, recipe.correction.rebalance_every
    if not (recipe.counts_steps or recipe.tracks_bases):
        return
    # Distributed checkpoints take a step with zero rates, only to have the state created.
    moved = any(bool(group.get("lr", 1) != 0) for group in param_groups)
    keep((job for job, _ in taken), state, moved=moved)
    if not moved:
        return
    steps = _count_step(param_groups) if recipe.counts_steps else 0
    balances = every is not None and steps % every == 0
    if not (correction.carries_moments or balances):
        return
    present = [Job(job.pair, job.A, job.B) for job, _ in taken]
    compute_roots(present, recipe)
    if correction.carries_moments:
        for (job, before), now in zip(taken, present, strict=True):
            _carry_moments(job.factors(before), now, recipe, moments_of, state)
    if balances:
        trained = {id(p) for group in param_groups for p in group["params"]}
        _rebalance([job for job in present if _both_trained(job.A, job.B, trained)], recipe, moments_of, state)


def _both_trained(A: Tensor, B: Tensor, owned: Collection[int]) -> bool:
    return all(factor.requires_grad and id(factor) in owned for factor in (A, B))


def _count_step(param_groups: Sequence[ParamGroup]) -> int:
    steps = steps_taken(param_groups) + 1
    for group in param_groups:
        group[_STEPS] = steps
    return steps


def _carry_moments(old: Factors, job: Job, recipe: Recipe, moments_of: MomentsOf, state: State) -> None:
    """Carries a pair's moments from the bases of its old factors to those of its present ones."""
    exponent = recipe.correction.basis_exponent
    assert exponent is not None
    T, R = basis_change(old, job.present, exponent)
    pair, dtype = job.pair, job.dtype
    # Of uncorrelated coordinates, squares add up with the squares of the coefficients.
    for matrix, moments in zip((T, T.square()), moments_of(job.A), strict=True):
        for moment in moments:
            moment.copy_(pair.join_A(matrix @ pair.split_A(moment).to(dtype)))
    for matrix, moments in zip((R, R.square()), moments_of(job.B), strict=True):
        for moment in moments:
            moment.copy_(pair.join_B(pair.split_B(moment).to(dtype) @ matrix))
    for parameter, matrix in ((job.A, T), (job.B, R.mT)):
        carry(parameter, state, recipe.correction.carry(remembered(parameter, state), matrix))


def _rebalance(jobs: Sequence[Job], recipe: Recipe, moments_of: MomentsOf, state: State) -> None:
    olds = [job.factors(PairTensors(job.A.detach().clone(), job.B.detach().clone())) for job in jobs]
    balanced = [Job(job.pair, job.A, job.B) for job in jobs]
    for old, job in zip(olds, balanced, strict=True):
        T, T_inverse = balancing_transform(old.A, old.B)  # (e, r, r)
        job.A.copy_(job.pair.join_A(T @ old.A))
        job.B.copy_(job.pair.join_B(old.B @ T_inverse))
    compute_roots(balanced, recipe)
    for old, job in zip(olds, balanced, strict=True):
        _carry_moments(old, job, recipe, moments_of, state)
