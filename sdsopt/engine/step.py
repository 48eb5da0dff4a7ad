"""Correction around an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.engine.backward import is_hooked
from sdsopt.engine.batch import Batch, Side
from sdsopt.engine.clipping import clip
from sdsopt.engine.job import Distributions, Job
from sdsopt.engine.presence import Presence
from sdsopt.engine.recipe import Recipe
from sdsopt.errors import (
    DoubleCorrectionError,
    StaleParametersError,
    UnsupportedGradientError,
    UnsupportedOptimizerError,
)
from sdsopt.linalg import without_autocast
from sdsopt.pairs import LoRAPair

ParamGroup = dict[str, Any]
DecayOf = Callable[[ParamGroup, Tensor], "float | Tensor"]


class StepEngine:
    """Corrects the gradients of pairs for the time of one step.

    Extra memory during a step: the corrected gradients, one copy of the LoRA parameters; with a correction that uses
    updates, a second copy; with `max_grad_norm`, a copy of the other gradients; and one pair at a time in float64.

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
        self._presence = Presence()

    def owned_pairs(self, param_groups: Iterable[ParamGroup]) -> list[LoRAPair]:
        """Returns the pairs of which the groups hold a factor, and remembers these factors.

        Raises:
            PairShapeError: Two factors do not fit together.
            DoubleCorrectionError: Backward corrects them already.
        """
        owned = {id(parameter) for group in param_groups for parameter in group["params"]}
        found: list[LoRAPair] = []
        for index, pair in enumerate(self.pairs):
            sides = {(index, side) for side, parameter in (("A", pair.A), ("B", pair.B)) if id(parameter) in owned}
            if sides:
                pair.check()
                for _, side in sides:
                    _require_unhooked(pair, side)
                found.append(pair)
                self._was_owned |= sides
        return found

    def parted_pairs(self, param_groups: Iterable[ParamGroup]) -> list[LoRAPair]:
        """Returns the pairs of which the groups hold one factor, while the other is trained elsewhere."""
        owned = {id(parameter) for group in param_groups for parameter in group["params"]}
        both = ((pair, pair.A, pair.B) for pair in self.pairs)
        return [
            pair for pair, A, B in both if A.requires_grad and B.requires_grad and (id(A) in owned) != (id(B) in owned)
        ]

    def any_gradient(self, param_groups: Iterable[ParamGroup]) -> bool:
        """Tells whether any parameter of the groups has a gradient."""
        return any(parameter.grad is not None for group in param_groups for parameter in group["params"])

    @contextmanager
    def corrected(self, param_groups: Sequence[ParamGroup], decay_of: DecayOf) -> Generator[int]:
        """Puts corrected gradients in place of the raw ones; on exit, the raw ones are back.

        The inner optimizer steps inside the context. Everything that can fail is computed before a gradient is
        touched.

        Args:
            param_groups: The optimizer's groups; only gradients of their parameters are corrected.
            decay_of: Share of a parameter that its group's step takes off as decoupled weight decay.

        Yields:
            The number of pairs corrected.

        Raises:
            StaleParametersError: A factor was replaced in the model and the optimizer holds the old one.
            UnequalGradientsError: A sharded factor has a gradient on some processes only.
            UnsupportedGradientError: A gradient is sparse.
            PairShapeError: Two factors do not fit together.
            DoubleCorrectionError: `sdsopt.attach` corrects these gradients already.
            UnsupportedOptimizerError: The optimizer was given other parameters in place of all factors.
        """
        groups = {id(parameter): group for group in param_groups for parameter in group["params"]}
        batch = self._batch(groups)
        device_types = {job.A.device.type for job in batch.jobs}
        uses_updates = self.recipe.correction.uses_updates
        with torch.no_grad(), without_autocast(device_types):
            gradients = batch.precondition(self._presence)
            if uses_updates:
                batch.remember()

        with _gradients_replaced(gradients), self._clipped(param_groups):
            yield len({id(side.job) for side in batch.sides if side.has_gradient})

        if uses_updates:
            with torch.no_grad(), without_autocast(device_types):
                batch.postcondition(lambda parameter: decay_of(groups[id(parameter)], parameter))

    @torch.no_grad()
    def _batch(self, groups: Mapping[int, ParamGroup]) -> Batch:
        """The pairs of which a factor has a gradient, and those of which other processes need this one's share."""
        self._require_factors(groups)
        jobs: list[Job] = []
        sides: list[Side] = []
        for index, pair in enumerate(self.pairs):
            where = Distributions.of(pair, self.recipe)
            job = Job(pair, where.A.local(pair.A.detach()), where.B.local(pair.B.detach()), where)
            joins = False
            members: list[Side] = []
            for letter, factor, how in (("A", pair.A, where.A), ("B", pair.B, where.B)):
                has_gradient = self._is_target(index, letter, factor, groups)
                trained = factor.requires_grad and id(factor) in groups
                joins = joins or has_gradient or (where.communicate and trained)
                if has_gradient or (how.is_exchanged and trained):
                    members.append(Side(job, letter, factor, has_gradient))
            if joins:
                pair.check()
                jobs.append(job)
                sides += members
        return Batch(jobs, sides, self.recipe)

    def _require_factors(self, groups: Mapping[int, object]) -> None:
        """Makes sure that the optimizer still holds a factor, if it ever did."""
        if self._was_owned and not any(id(p) in groups for pair in self.pairs for p in (pair.A, pair.B)):
            raise UnsupportedOptimizerError(
                "the optimizer holds no LoRA factor any more: what was put in their place, such as the flat partitions "
                "of DeepSpeed ZeRO, cannot be corrected in its step. Correct the gradients in backward instead: leave "
                "the optimizer bare, and call sdsopt.attach(model) after deepspeed.initialize."
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
        _require_unhooked(pair, side)
        self._was_owned.add((index, side))
        return True

    @contextmanager
    def _clipped(self, param_groups: Sequence[ParamGroup]) -> Generator[None]:
        if self.max_grad_norm is None:
            yield
            return
        parameters = [p for group in param_groups for p in group["params"] if p.grad is not None]
        # Copies, since clipping writes in place and the raw gradients shall come back.
        with _gradients_replaced({parameter: parameter.grad.clone() for parameter in parameters}):
            clip(parameters, self.max_grad_norm)
            yield


def _require_unhooked(pair: LoRAPair, side: str) -> None:
    if is_hooked(getattr(pair, side)):
        raise DoubleCorrectionError(
            f"sdsopt.attach corrects the gradient of factor {side} of {pair.name} in backward, so SDSPreconditioner "
            "would correct it a second time. Use one of the two: remove() the handle, or leave the optimizer bare."
        )


@contextmanager
def _gradients_replaced(gradients: Mapping[Parameter, Tensor]) -> Generator[None]:
    replaced: list[tuple[Parameter, Tensor | None]] = []
    try:
        for parameter, gradient in gradients.items():
            replaced.append((parameter, parameter.grad))
            parameter.grad = gradient
        yield
    finally:
        for parameter, raw in replaced:
            # An inner optimizer that frees gradients in its step means it.
            if parameter.grad is not None:
                parameter.grad = raw
