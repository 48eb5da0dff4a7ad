"""What corrections make of the gradients that are there, measured without a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.corrections import NO_MEMORY, Factors, LearningRates, Memory, PairTensors
from sdsopt.diagnostics import (
    alignment,
    condition_number,
    effective_rank,
    gram_singular_values,
    pair_spectra,
    stable_rank,
)
from sdsopt.engine.backward import is_hooked
from sdsopt.engine.job import Job
from sdsopt.engine.memory import State, recall
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.roots import compute_roots
from sdsopt.errors import DoubleCorrectionError
from sdsopt.linalg import without_autocast
from sdsopt.pairs import LoRAPair, live
from sdsopt.sharding import whole

_SHORT = 1e-9  # a step so short that no limit on its length acts


@dataclass(frozen=True)
class StepMeasurement:
    """What one correction makes of a pair's gradients. None where a factor has no gradient.

    Attributes:
        effective_rank_A: Effective rank (entropy) of the corrected gA; mean over the pair's blocks.
        effective_rank_B: Of gB.
        stable_rank_A: Stable rank of the corrected gA.
        stable_rank_B: Of gB.
        alignment: Cosine between the full gradient G and the move of the product that this correction makes with SGD;
            None where G was not captured.
    """

    effective_rank_A: float | None
    effective_rank_B: float | None
    stable_rank_A: float | None
    stable_rank_B: float | None
    alignment: float | None


@dataclass(frozen=True)
class PairMeasurement:
    """A pair's factors, and its gradients under each correction.

    Attributes:
        spectrum_A: Singular values of A, largest first; the blocks one after the other.
        spectrum_B: Of B.
        condition_A: κ(A); the largest of the blocks. Infinite where a block is rank-deficient, NaN where it is zero.
        condition_B: κ(B), likewise.
        stable_rank: Stable rank of ΔW; mean over the blocks.
        effective_rank: Effective rank of ΔW.
        steps: By correction.
    """

    spectrum_A: tuple[float, ...]
    spectrum_B: tuple[float, ...]
    condition_A: float
    condition_B: float
    stable_rank: float
    effective_rank: float
    steps: Mapping[str, StepMeasurement]


def measure(
    pairs: Sequence[LoRAPair],
    recipes: Mapping[str, Recipe],
    full_gradients: Mapping[LoRAPair, Tensor] | None = None,
    *,
    step: int = 0,
    state: State | None = None,
) -> dict[str, PairMeasurement]:
    """Measures every pair that has a gradient.

    Nothing is changed. Cost: one QR of each factor and singular values of r×r matrices; for each recipe the correction
    itself and the eigenvalues of each gradient's Gram matrix, all in float64; and the device is waited for. Sharded
    factors are gathered, for which all processes must call it.

    Args:
        pairs: The pairs.
        recipes: The corrections to measure, by the names to report them under.
        full_gradients: G (m, n) by pair, where it was captured.
        step: How many steps were taken before, for corrections that look at it.
        state: The optimizer's state, in which a correction finds what it remembers; None for a first step's.

    Returns:
        The measurements, by pair name.

    Raises:
        DoubleCorrectionError: `sdsopt.attach` has corrected the gradients already.
    """
    measured = [pair for pair, A, B in live(pairs) if A.grad is not None or B.grad is not None]
    for pair in measured:
        pair.check()
        if is_hooked(pair.A) or is_hooked(pair.B):
            raise DoubleCorrectionError(
                f"the gradients of {pair.name} are corrected in backward (sdsopt.attach), so the raw ones are "
                "gone; remove() the handle to measure"
            )
    full_gradients = full_gradients or {}
    jobs = [Job(pair, whole(pair.A.detach()), whole(pair.B.detach())) for pair in measured]
    raw = {pair: PairTensors(_whole_gradient(pair.A), _whole_gradient(pair.B)) for pair in measured}
    with torch.no_grad(), without_autocast({job.A.device.type for job in jobs}):
        steps: list[dict[str, StepMeasurement]] = [{} for _ in jobs]
        for name, recipe in recipes.items():
            fresh = [Job(job.pair, job.A, job.B, step, memory=_recalled(job.pair, recipe, state)) for job in jobs]
            compute_roots(fresh, recipe)
            for job, found in zip(fresh, steps, strict=True):
                found[name] = _step(job, raw[job.pair], recipe, full_gradients.get(job.pair))
        return {job.pair.name: _pair(job, found) for job, found in zip(jobs, steps, strict=True)}


def _recalled(pair: LoRAPair, recipe: Recipe, state: State | None) -> Memory:
    if state is None or not recipe.correction.keeps_memory:
        return NO_MEMORY
    return recall(pair, state)  # by the parameters, where the job to measure has whole copies


def _whole_gradient(parameter: Parameter) -> Tensor | None:
    return None if parameter.grad is None else whole(parameter.grad)


def _step(job: Job, raw: PairTensors, recipe: Recipe, full_gradient: Tensor | None) -> StepMeasurement:
    factors = job.present
    given = job.split(raw).map(lambda gradient: gradient.to(job.dtype))
    corrected, _ = recipe.correction.advance(factors, given, job.memory)
    wide, tall = corrected
    spectra = PairTensors(
        A=None if wide is None else gram_singular_values(wide.mT),
        B=None if tall is None else gram_singular_values(tall),
    )
    return StepMeasurement(
        effective_rank_A=None if spectra.A is None else _mean(effective_rank(spectra.A)),
        effective_rank_B=None if spectra.B is None else _mean(effective_rank(spectra.B)),
        stable_rank_A=None if spectra.A is None else _mean(stable_rank(spectra.A)),
        stable_rank_B=None if spectra.B is None else _mean(stable_rank(spectra.B)),
        alignment=None if full_gradient is None else _alignment(recipe, factors, corrected, full_gradient),
    )


def _alignment(recipe: Recipe, factors: Factors, corrected: PairTensors, full_gradient: Tensor) -> float:
    # In the dtype of the computation, so that a step this short is not taken for rounding of the stored factors.
    exact = replace(factors, stored_A=factors.A, stored_B=factors.B)
    short = corrected.map(lambda gradient: _SHORT * gradient)
    moved = recipe.correction.postcondition(exact, short, LearningRates(_SHORT, _SHORT))
    A, B = (None if step is None else step[0] for step in moved)  # one block: a linear layer
    return alignment(full_gradient, factors.A[0], factors.B[0], A, B).item()


def _pair(job: Job, steps: Mapping[str, StepMeasurement]) -> PairMeasurement:
    factors = job.present
    spectra = pair_spectra(factors.A, factors.B)  # scaling changes no rank
    return PairMeasurement(
        spectrum_A=tuple(spectra.A.flatten().tolist()),
        spectrum_B=tuple(spectra.B.flatten().tolist()),
        condition_A=condition_number(spectra.A).max().item(),
        condition_B=condition_number(spectra.B).max().item(),
        stable_rank=_mean(stable_rank(spectra.product)),
        effective_rank=_mean(effective_rank(spectra.product)),
        steps=steps,
    )


def _mean(values: Tensor) -> float:
    return values.mean().item()
