"""From pairs to corrected gradients. The only file that reads or writes `.grad`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.corrections import Correction, Factors, PairTensors
from sdsopt.errors import StaleParametersError, UnsupportedGradientError
from sdsopt.linalg import InverseRoot, accurate_dtype, without_autocast
from sdsopt.pairs import LoRAPair

ParamGroup = dict[str, Any]
DecayOf = Callable[[ParamGroup, Tensor], "float | Tensor"]


@dataclass
class _Job:
    """What one pair needs in one step."""

    pair: LoRAPair
    A: Parameter
    B: Parameter
    targets: PairTensors  # the factors to correct: owned by the optimizer, with a gradient
    before: PairTensors = field(default=PairTensors(None, None))  # their values before the step, for the split form
    roots_A: dict[float, Tensor] = field(default_factory=dict)  # exponent → (e, r, r)
    roots_B: dict[float, Tensor] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return accurate_dtype(self.A.device)

    def split(self, tensors: PairTensors) -> PairTensors:
        """Views tensors of the parameters' shapes as (e, r, n) and (e, m, r), in the dtype to compute in."""
        return PairTensors(
            A=None if tensors.A is None else self.pair.split_A(tensors.A).to(self.dtype),
            B=None if tensors.B is None else self.pair.split_B(tensors.B).to(self.dtype),
        )

    def join(self, blocks: PairTensors) -> PairTensors:
        """Inverse of `split`, in the parameters' own dtype and strides: fused optimizers misread any other."""
        return PairTensors(
            A=None if blocks.A is None else torch.empty_like(self.A).copy_(self.pair.join_A(blocks.A)),
            B=None if blocks.B is None else torch.empty_like(self.B).copy_(self.pair.join_B(blocks.B)),
        )

    def factors(self) -> Factors:
        A = self.A.detach() if self.before.A is None else self.before.A
        B = self.B.detach() if self.before.B is None else self.before.B
        return Factors(
            stored_A=self.pair.split_A(A),
            stored_B=self.pair.split_B(B),
            scaling=self.pair.scaling,
            dtype=self.dtype,
            roots_A=self.roots_A,
            roots_B=self.roots_B,
        )


class Engine:
    """Corrects the gradients of pairs for the time of one step.

    Extra memory during a step: the corrected gradients, one copy of the LoRA parameters; with a correction that uses
    updates, a second copy; and one pair at a time in float64.

    Args:
        pairs: The pairs to correct.
        correction: The correction.
        inverse_root: The method for the roots of the Gram matrices.
        damping: Relative damping δ ≥ 0.
    """

    def __init__(
        self, pairs: Sequence[LoRAPair], correction: Correction, inverse_root: InverseRoot, damping: float
    ) -> None:
        self.pairs = tuple(pairs)
        self.correction = correction
        self.inverse_root = inverse_root
        self.damping = damping
        self._was_owned: set[tuple[int, str]] = set()

    def owned_pairs(self, param_groups: Iterable[ParamGroup]) -> list[LoRAPair]:
        """Returns the pairs of which the groups hold a factor, and remembers these factors.

        Raises:
            PairShapeError: Two factors do not fit together.
        """
        owned = {id(parameter) for group in param_groups for parameter in group["params"]}
        found: list[LoRAPair] = []
        for index, pair in enumerate(self.pairs):
            sides = {(index, side) for side, parameter in (("A", pair.A), ("B", pair.B)) if id(parameter) in owned}
            if sides:
                pair.check()
                found.append(pair)
                self._was_owned |= sides
        return found

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
            UnsupportedGradientError: A gradient is sparse.
            PairShapeError: Two factors do not fit together.
        """
        groups = {id(parameter): group for group in param_groups for parameter in group["params"]}
        jobs = self._jobs(groups)
        device_types = {job.A.device.type for job in jobs}
        with torch.no_grad(), without_autocast(device_types):
            self._compute_roots(jobs)
            corrected = [self._precondition(job) for job in jobs]
            if self.correction.uses_updates:
                for job in jobs:
                    job.before = job.targets.map(torch.clone)

        with _gradients_replaced(jobs, corrected):
            yield len(jobs)

        if self.correction.uses_updates:
            with torch.no_grad(), without_autocast(device_types):
                for job in jobs:
                    self._postcondition(job, groups, decay_of)

    def _jobs(self, groups: Mapping[int, ParamGroup]) -> list[_Job]:
        jobs: list[_Job] = []
        for index, pair in enumerate(self.pairs):
            A, B = pair.A, pair.B
            targets = PairTensors(
                A=self._target(index, "A", A, groups),
                B=self._target(index, "B", B, groups),
            )
            if targets.A is not None or targets.B is not None:
                pair.check()
                jobs.append(_Job(pair, A, B, targets))
        return jobs

    def _target(self, index: int, side: str, parameter: Parameter, groups: Mapping[int, object]) -> Parameter | None:
        if parameter.grad is None:
            return None
        name = self.pairs[index].name
        if id(parameter) not in groups:
            if (index, side) in self._was_owned:
                raise StaleParametersError(
                    f"factor {side} of {name} was replaced in the model after the optimizer was built, so a step "
                    "would move a parameter that the model no longer uses. Build the optimizer again from the model's "
                    "present parameters (and wrap it again)."
                )
            return None  # another optimizer's
        if parameter.grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"the gradient of factor {side} of {name} is {parameter.grad.layout}; only dense gradients can be "
                "corrected. For an embedding, build it with sparse=False."
            )
        self._was_owned.add((index, side))
        return parameter

    def _compute_roots(self, jobs: Sequence[_Job]) -> None:
        """Fills the jobs' roots: one batched call for each rank and device, whatever the factors' lengths."""
        exponents = self.correction.gram_exponents
        if not exponents:
            return
        batches: dict[tuple[int, torch.device], list[tuple[dict[float, Tensor], Tensor]]] = defaultdict(list)
        for job in jobs:
            for roots, tall in ((job.roots_A, job.pair.split_A(job.A).mT), (job.roots_B, job.pair.split_B(job.B))):
                reduced = self.inverse_root.reduce(tall.to(job.dtype))  # (e, d, r) → (e, r, r)
                batches[reduced.shape[-1], reduced.device].append((roots, reduced))

        for batch in batches.values():
            stacked = torch.cat([reduced for _, reduced in batch])  # (k, r, r)
            result = self.inverse_root.compute(stacked, exponents, self.damping)
            for exponent, powers in zip(exponents, result.roots, strict=True):
                parts = powers.split([len(reduced) for _, reduced in batch])
                for (roots, _), part in zip(batch, parts, strict=True):
                    roots[exponent] = part

    def _precondition(self, job: _Job) -> PairTensors:
        gradients = job.targets.map(lambda parameter: parameter.grad)
        return job.join(self.correction.precondition(job.factors(), job.split(gradients)))

    def _postcondition(self, job: _Job, groups: Mapping[int, ParamGroup], decay_of: DecayOf) -> None:
        """Replaces the step that was taken by the one that the correction makes of it; the decay stays as it is."""
        decayed = job.targets.map(lambda p, start: start * (1 - decay_of(groups[id(p)], p)), job.before)
        updates = job.targets.map(torch.sub, decayed)
        mapped = job.join(self.correction.postcondition(job.factors(), job.split(updates)))
        job.targets.map(lambda p, start, update: p.copy_(start + update), decayed, mapped)


@contextmanager
def _gradients_replaced(jobs: Sequence[_Job], corrected: Sequence[PairTensors]) -> Generator[None]:
    replaced: list[tuple[Tensor, Tensor | None]] = []
    try:
        for job, gradients in zip(jobs, corrected, strict=True):
            for parameter, gradient in zip(job.targets, gradients, strict=True):
                if parameter is not None:
                    replaced.append((parameter, parameter.grad))
                    parameter.grad = gradient
        yield
    finally:
        for parameter, raw in replaced:
            # An inner optimizer that frees gradients in its step means it.
            if parameter.grad is not None:
                parameter.grad = raw
