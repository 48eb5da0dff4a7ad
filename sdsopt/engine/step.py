"""Correction around an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.corrections import LearningRates, PairTensors
from sdsopt.engine.backward import is_hooked
from sdsopt.engine.batch import Batch
from sdsopt.engine.between_steps import MomentsOf, finish_step, require_partners, require_trackable, steps_taken
from sdsopt.engine.buffers import Buffers
from sdsopt.engine.clipping import clip
from sdsopt.engine.job import Job
from sdsopt.engine.kept_roots import KeptRoots
from sdsopt.engine.many import copy, differences, flat, like, set_to_sums, shrunk
from sdsopt.engine.memory import State, recall
from sdsopt.engine.places import HERE, Places
from sdsopt.engine.presence import Presence
from sdsopt.engine.recipe import Recipe
from sdsopt.engine.roots import compute_roots
from sdsopt.engine.shards import Shards, Side
from sdsopt.engine.stacks import stacks
from sdsopt.errors import (
    DoubleCorrectionError,
    StaleParametersError,
    UnsupportedCorrectionError,
    UnsupportedGradientError,
)
from sdsopt.linalg import empty_result, without_autocast, workspace
from sdsopt.pairs import LoRAPair

ParamGroup = dict[str, Any]
DecayOf = Callable[[ParamGroup, Tensor], "float | Tensor"]


class _Target(NamedTuple):
    """The factors of one pair to correct: owned by the optimizer, with a gradient."""

    job: Job
    parameters: PairTensors
    before: PairTensors  # their values before the step, where these are still needed after it

    @property
    def steps(self) -> bool:
        """Whether any factor does."""
        return self.parameters.A is not None or self.parameters.B is not None


class StepEngine:
    """Corrects the gradients of pairs for the time of one step.

    Extra memory during a step: the corrected gradients, one copy of the LoRA parameters; with a correction that uses
    updates or carries moments, a second copy; with `max_grad_norm`, a copy of the other gradients. And what is computed
    with at a time: a few megabytes on a CPU, a few hundred elsewhere, or one pair in float64 where the correction needs
    it whole. On a CPU the first two are kept for the next step.

    Args:
        pairs: The pairs to correct.
        recipe: The correction and how it is computed.
        max_grad_norm: The norm to which the gradients of a step are clipped, after the correction; None for any.
    """

    def __init__(self, pairs: Sequence[LoRAPair], recipe: Recipe, max_grad_norm: float | None = None) -> None:
        self.pairs = tuple(pairs)
        self.recipe = recipe
        self.max_grad_norm = max_grad_norm
        self._was_owned: set[tuple[int, str]] = set()
        self._checked: dict[int, Hashable] = {}
        self._presence = Presence()
        self._buffers = Buffers()
        self._roots = KeptRoots(recipe.update_every)

    def owned_pairs(self, param_groups: Iterable[ParamGroup]) -> list[LoRAPair]:
        """Returns the pairs of which the groups hold a factor, and remembers these factors.

        Raises:
            PairShapeError: Two factors do not fit together.
            DoubleCorrectionError: Backward corrects them already.
            UnsupportedCorrectionError: Moments cannot follow the bases of a pair, or no pair can be rebalanced.
        """
        owned = {id(parameter) for group in param_groups for parameter in group["params"]}
        found: list[LoRAPair] = []
        for index, pair in enumerate(self.pairs):
            sides = {(index, side) for side, parameter in (("A", pair.A), ("B", pair.B)) if id(parameter) in owned}
            if sides:
                pair.check()
                for _, side in sides:
                    _require_unhooked(pair, side, getattr(pair, side))
                found.append(pair)
                self._was_owned |= sides
        require_trackable(found, self.recipe, owned)
        return found

    def forget_roots(self) -> None:
        """Makes the next step compute all roots, whenever they are due."""
        self._roots.forget()

    def any_gradient(self, param_groups: Iterable[ParamGroup]) -> bool:
        """Tells whether any parameter of the groups has a gradient."""
        return any(parameter.grad is not None for group in param_groups for parameter in group["params"])

    @contextmanager
    def corrected(
        self, param_groups: Sequence[ParamGroup], decay_of: DecayOf, moments_of: MomentsOf, state: State
    ) -> Generator[int]:
        """Puts corrected gradients in place of the raw ones; on exit, the raw ones are back.

        The inner optimizer steps inside the context. Everything that can fail is computed before a gradient is
        touched.

        Args:
            param_groups: The optimizer's groups; only gradients of their parameters are corrected.
            decay_of: Share of a parameter that its group's step takes off as decoupled weight decay.
            moments_of: What the optimizer remembers of a parameter's gradients.
            state: The optimizer's state, in which what the correction remembers is kept.

        Yields:
            The number of pairs corrected.

        Raises:
            StaleParametersError: A factor was replaced in the model and the optimizer holds the old one.
            UnsupportedGradientError: A gradient is sparse.
            PairShapeError: Two factors do not fit together.
            DoubleCorrectionError: `sdsopt.attach` corrects these gradients already.
            UnequalGradientsError: A sharded factor has a gradient on some processes only.
            UnsupportedCorrectionError: Factors were sharded meanwhile, and the correction needs them whole; or moments
                are to be carried, and another optimizer trains the partner of a factor; or a step that is not like
                every other is captured in a CUDA graph.
        """
        correction = self.recipe.correction
        groups = {id(parameter): group for group in param_groups for parameter in group["params"]}
        if self.recipe.counts_steps:
            _require_uncaptured(self.recipe)
        step = steps_taken(param_groups)
        targets, shards = self._targets(groups, step)
        require_partners((target.job for target in targets), self.recipe, groups)
        if correction.keeps_memory:
            for target in targets:
                target.job.memory = recall(target.job, state)
        jobs = [*(target.job for target in targets), *shards.jobs]
        device_types = {job.A.device.type for job in jobs}
        bound = self.recipe.max_workspace_bytes
        self._buffers.start_step()
        with torch.no_grad(), without_autocast(device_types), workspace(bound, self._buffers.empty_like):
            shards.exchange()
            lacking = self._roots.lacking(jobs, step)
            shards.compare(compute_roots(lacking, self.recipe, shards.words) if lacking else shards.add_up_words())
            gradients: dict[Tensor, Tensor | None] = {}
            for batch in self._batches(targets, groups):
                gradients.update(self._precondition(batch))
            gradients.update(shards.precondition(correction))
            if correction.uses_updates or correction.carries_moments:
                targets = self._before_step(targets, gradients)
                shards.remember(gradients)

        with _gradients_replaced(gradients), self._clipped(param_groups, gradients):
            yield len(targets) + shards.corrected_pairs
        gradients.clear()  # their memory is needed for the updates
        self._buffers.start_round()

        with torch.no_grad(), without_autocast(device_types), workspace(bound, self._buffers.empty_like):
            if correction.uses_updates:
                stepped = [target for target in targets if target.steps]
                for batch in self._batches(stepped, groups):
                    self._postcondition(batch, groups, decay_of)
                shards.postcondition(
                    correction, lambda p: decay_of(groups[id(p)], p), lambda p: groups[id(p)].get("lr")
                )
            taken = [(target.job, target.before) for target in targets]
            finish_step(taken, self.recipe, param_groups, moments_of, state)
            self._roots.keep(jobs)

    def _targets(self, groups: Mapping[int, ParamGroup], step: int) -> tuple[list[_Target], Shards]:
        """What is to be corrected: pairs that are here, and pairs that other processes hold a share of."""
        targets: list[_Target] = []
        jobs: list[Job] = []
        sides: list[Side] = []
        for index, pair in enumerate(self.pairs):
            try:
                A, B = pair.A, pair.B
            except StaleParametersError:
                if any((index, side) in self._was_owned for side in "AB"):
                    raise
                continue  # another adapter, which was deleted
            places = Places.of(pair, A, B, self.recipe)
            if places is not HERE:
                job, of_pair = self._shares(index, places, groups, step)
                if job is not None:
                    self._check(index, A, B)
                    jobs.append(job)
                    sides += of_pair
                continue
            parameters = PairTensors(
                A=A if self._is_target(index, "A", A, groups) else None,
                B=B if self._is_target(index, "B", B, groups) else None,
            )
            target = _Target(Job(pair, A, B, step), parameters, PairTensors(None, None))
            if target.steps:
                self._check(index, A, B)
                targets.append(target)
        if not (targets or jobs):
            self._require_ownership(groups)
        return targets, Shards(jobs, sides, self._presence)

    @torch.no_grad()
    def _shares(
        self, index: int, places: Places, groups: Mapping[int, ParamGroup], step: int
    ) -> tuple[Job | None, list[Side]]:
        """This process's part of a pair: all processes take part if they train it, whatever gradients they have."""
        pair = self.pairs[index]
        trained = [factor.requires_grad and id(factor) in groups for factor in (pair.A, pair.B)]
        if not any(trained):
            return None, []
        require_trackable([pair], self.recipe, groups)
        A, B = (where.local(factor.detach()) for where, factor in zip(places, (pair.A, pair.B), strict=True))
        job = Job(pair, A, B, step, places)
        sides: list[Side] = []
        for letter, factor, where, trains in zip("AB", (pair.A, pair.B), places, trained, strict=True):
            has_gradient = self._is_target(index, letter, factor, groups)
            if has_gradient or (trains and where.is_exchanged):
                sides.append(Side(job, letter, factor, has_gradient))
        return job, sides

    def _check(self, index: int, A: Parameter, B: Parameter) -> None:
        """Checks a pair, unless its factors look as they did when they last passed."""
        seen = type(A), A.shape, type(B), B.shape
        if self._checked.get(index) != seen:
            self.pairs[index].check()
            self._checked[index] = seen

    def _require_ownership(self, groups: Mapping[int, ParamGroup]) -> None:
        owned = [id(getattr(self.pairs[index], side)) in groups for index, side in self._was_owned]
        if owned and not any(owned):
            raise StaleParametersError(
                f"the optimizer no longer holds any of the {len(owned)} LoRA factors that it was built with. DeepSpeed "
                "ZeRO puts flat parameters in their place: leave its optimizer bare, and call sdsopt.attach(model) "
                "after deepspeed.initialize. Otherwise, build the optimizer again from the model's parameters."
            )

    def _is_target(self, index: int, side: str, parameter: Parameter, groups: Mapping[int, object]) -> bool:
        if parameter.grad is None:
            return False
        pair = self.pairs[index]
        if id(parameter) not in groups:
            if (index, side) in self._was_owned:
                raise StaleParametersError(
                    f"factor {side} of {pair.name} was replaced in the model after the optimizer was built, so a step "
                    "would move a parameter that the model no longer uses. Build the optimizer again from the model's "
                    "present parameters (and wrap it again)."
                )
            return False  # another optimizer's
        if parameter.grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"the gradient of factor {side} of {pair.name} is {parameter.grad.layout}; only dense gradients can be "
                "corrected. For an embedding, build it with sparse=False."
            )
        _require_unhooked(pair, side, parameter)
        self._was_owned.add((index, side))
        return True

    def _batches(self, targets: Sequence[_Target], groups: Mapping[int, ParamGroup]) -> list[list[_Target]]:
        """Groups the targets that a correction can be given together."""

        def in_common(target: _Target) -> Hashable:
            pair = target.job.pair
            alone = None if pair.path_E is None else id(pair)  # a diagonal is one pair's
            param_groups = (None if p is None else id(groups[id(p)]) for p in target.parameters)
            remembered = (tuple(names) for names in target.job.memory)
            return alone, target.job.scaling, pair.blocks, *param_groups, *remembered

        return stacks(targets, lambda target: (target.job.A, target.job.B), in_common, self.recipe.max_workspace_bytes)

    def _precondition(self, batch: Sequence[_Target]) -> dict[Tensor, Tensor | None]:
        """Returns the corrected gradients by parameter; None for one that shall not step."""
        raw = [target.parameters.map(lambda parameter: parameter.grad) for target in batch]
        corrected = Batch([target.job for target in batch]).precondition(self.recipe.correction, raw)
        return {
            parameter: gradient
            for target, both in zip(batch, corrected, strict=True)
            for parameter, gradient in zip(target.parameters, both, strict=True)
            if parameter is not None
        }

    def _before_step(self, targets: Sequence[_Target], gradients: Mapping[Tensor, Tensor | None]) -> list[_Target]:
        """Keeps the values of those factors that are to step."""
        stepping = [
            PairTensors(*(None if p is None or gradients[p] is None else p for p in target.parameters))
            for target in targets
        ]
        parameters = flat(stepping)
        copies = [empty_result(parameter) for parameter in parameters]
        copy(parameters, copies)
        return [
            _Target(target.job, *both) for target, *both in zip(targets, stepping, like(stepping, copies), strict=True)
        ]

    @contextmanager
    def _clipped(self, param_groups: Sequence[ParamGroup], own: Mapping[Tensor, object]) -> Generator[None]:
        if self.max_grad_norm is None:
            yield
            return
        parameters = [p for group in param_groups for p in group["params"] if p.grad is not None]
        # Clipping writes in place: into copies, where the gradient is not our own and shall come back.
        raw = [parameter for parameter in parameters if parameter not in own]
        with _gradients_replaced({parameter: parameter.grad.clone() for parameter in raw}):
            clip(parameters, self.max_grad_norm)
            yield

    def _postcondition(self, batch: Sequence[_Target], groups: Mapping[int, ParamGroup], decay_of: DecayOf) -> None:
        """Replaces the steps that were taken by those that the correction makes of them; the decay stays as it is."""
        stepped, before = [target.parameters for target in batch], [target.before for target in batch]
        parameters = flat(stepped)
        decayed = shrunk(flat(before), [decay_of(groups[id(p)], p) for p in parameters])
        updates = like(stepped, differences(parameters, decayed))
        rates = LearningRates(*(None if p is None else groups[id(p)].get("lr") for p in stepped[0]))
        stacked = Batch([target.job for target in batch], before)
        mapped = flat(stacked.postcondition(self.recipe.correction, updates, rates))
        set_to_sums(parameters, decayed, mapped)


def _require_uncaptured(recipe: Recipe) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedCorrectionError(
            f"{recipe.correction} with update_every={recipe.update_every} and rebalance_every="
            f"{recipe.correction.rebalance_every} does not do the same in each step, and a CUDA graph that is captured "
            "of one step would repeat that one. Capture a correction that does, without these options, or take the "
            "steps outside of graphs."
        )


def _require_unhooked(pair: LoRAPair, side: str, parameter: Parameter) -> None:
    if is_hooked(parameter):
        raise DoubleCorrectionError(
            f"sdsopt.attach corrects the gradient of factor {side} of {pair.name} in backward, so SDSPreconditioner "
            "would correct it a second time. Use one of the two: remove() the handle, or leave the optimizer bare."
        )


@contextmanager
def _gradients_replaced(gradients: Mapping[Tensor, Tensor | None]) -> Generator[None]:
    replaced: list[tuple[Tensor, Tensor | None]] = []
    try:
        for parameter, gradient in gradients.items():
            replaced.append((parameter, parameter.grad))
            parameter.grad = gradient
        yield
    finally:
        for parameter, raw in replaced:
            # An inner optimizer that frees gradients in its step means it.
            if parameter.grad is not None or gradients[parameter] is None:
                parameter.grad = raw
