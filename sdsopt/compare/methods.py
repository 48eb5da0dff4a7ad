"""What is compared: how the matrices are trained (`Method`), and the optimizer inside (`Inner`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from sdsopt.corrections import Correction, make_correction
from sdsopt.errors import UnknownCorrectionError
from sdsopt.optimizer import SDSPreconditioner
from sdsopt.reference import SDSSchedule, convert

# Changes a model with plain LoRA layers, and what its optimizer does in a run of so many steps.
Reparametrize = Callable[[nn.Module, Optimizer, int], None]

_DAMPING = 1e-6  # the default of SDSPreconditioner


@final
@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        name: Its name in tables and on disk.
        adapts: Whether it trains LoRA adapters, or else the matrices themselves.
        correction: What corrects the adapters' gradients; None leaves the inner optimizer bare.
        reparametrize: What puts other layers in the place of the adapters, or changes the optimizer's groups; None
            leaves both. A module-level function, or a `functools.partial` of one.
        shortest: The fewest steps that a run of it can have.
        damping: The correction's relative damping.
        update_every: For how many steps roots serve.
    """

    name: str
    adapts: bool = True
    correction: Correction | None = None
    reparametrize: Reparametrize | None = None
    shortest: int = 1
    damping: float = _DAMPING
    update_every: int = 1

    @property
    def identity(self) -> str:
        """Tells apart two corrections of one name with different settings, in results on disk."""
        correction = "" if self.correction is None else f": {self.correction!r}"
        damping = "" if self.damping == _DAMPING else f", damping {self.damping:g}"
        reuse = "" if self.update_every == 1 else f", roots of every {self.update_every} steps"
        return f"{self.name}{correction}{damping}{reuse}"

    def set_up(self, model: nn.Module, optimizer: Optimizer, steps: int) -> Optimizer:
        """Makes a run this method's.

        Args:
            model: As the task built it; its layers may be replaced, their parameters stay.
            optimizer: The inner optimizer on these parameters.
            steps: The length of the run.

        Returns:
            The optimizer to step with.
        """
        if self.reparametrize is not None:
            self.reparametrize(model, optimizer, steps)
        if self.correction is None:
            return optimizer
        return SDSPreconditioner(
            optimizer, model, self.correction, damping=self.damping, update_every=self.update_every
        )


def _papers_parametrization(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    convert(model)
    schedule = SDSSchedule(model, optimizer, steps, warmup_steps=_WARM_UP)
    optimizer.register_step_post_hook(lambda *_: schedule.step())


_WARM_UP = 10  # the paper's

FULL = Method("full", adapts=False)
LORA = Method("lora")
PAPER = Method("sds-paper", reparametrize=_papers_parametrization, shortest=_WARM_UP + 1)
_NO_CORRECTIONS = {method.name: method for method in (LORA, PAPER)}


def make_method(correction: str | Correction) -> Method:
    """Returns the method of a correction's name, or of a correction itself; "sds-paper" is the paper's parametrization.

    Raises:
        ValueError: The name is unknown, or the correction's repr changes from run to run.
    """
    # "lora" is the bare optimizer, not the identity correction: the baseline pays no overhead.
    if isinstance(correction, str) and correction in _NO_CORRECTIONS:
        return _NO_CORRECTIONS[correction]
    # Resolved here, since a worker process does not know what the caller registered.
    try:
        resolved = make_correction(correction)
    except UnknownCorrectionError as error:
        raise UnknownCorrectionError(f"{error}, {PAPER.name}") from None
    name = correction if isinstance(correction, str) else repr(correction)
    if " object at 0x" in repr(resolved):
        raise ValueError(f"{name}: results on disk are found by the correction's repr; make it a dataclass")
    return Method(name, correction=resolved)


@dataclass(frozen=True)
class Inner:
    """An inner optimizer.

    Attributes:
        name: Its name in tables and on disk.
        build: Makes it from parameter groups, each of which sets its own "lr". A module-level function, where runs
            are spread over processes.
        shared_lr: Learning rate of `Task.shared_parameters`, the same for every method.
    """

    name: str
    build: Callable[[Iterable[dict[str, Any]]], Optimizer]
    shared_lr: float


def _adamw(groups: Iterable[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, weight_decay=0.0)  # decay would act on different quantities in each method


def _sgd(groups: Iterable[dict[str, Any]]) -> Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


_INNERS = {inner.name: inner for inner in (Inner("adamw", _adamw, 3e-3), Inner("sgd", _sgd, 0.02))}


def make_inner(inner: str | Inner) -> Inner:
    """Returns the inner optimizer of that name, or the given one.

    Raises:
        ValueError: The name is unknown.
    """
    if isinstance(inner, Inner):
        return inner
    if inner not in _INNERS:
        raise ValueError(f"unknown inner optimizer {inner!r}; known: {', '.join(_INNERS)}")
    return _INNERS[inner]
