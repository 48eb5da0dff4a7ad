"""One row of the table of inner optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

Make = Callable[..., Optimizer]


@dataclass(frozen=True)
class Inner:
    """One optimizer with its options.

    Attributes:
        name: The class, and a label where there are several.
        make: From parameters and, if it decays, `weight_decay`.
        group: What its param group must hold besides the parameters.
        decays: Whether it takes `weight_decay`.
        decoupled: Whether its decay, as it is built here, is decoupled.
        linear: Whether its step is so linear in the gradient that L2 decay looks decoupled.
        unknowable: Whether the share of its decay, as it is built here, cannot be told.
        pulls: Whether its step draws the weights towards values of its own.
        loads: Whether the bare optimizer can load its own state dict.
        weights_only: Whether `torch.load(weights_only=True)` reads its state dict.
        width: Of the network to train; the wide one's factors are long enough for low-bit state.
        dtype: In which it is accurate enough to measure its decay.
    """

    name: str
    make: Make
    group: dict[str, Any] = field(default_factory=dict)
    decays: bool = True
    decoupled: bool = False
    linear: bool = False
    unknowable: bool = False
    pulls: bool = False
    loads: bool = True
    weights_only: bool = True
    width: int = 12
    dtype: torch.dtype = torch.float64

    def __call__(self, parameters: Iterable[Parameter], weight_decay: float = 0.0) -> Optimizer:
        options: dict[str, Any] = {"weight_decay": weight_decay} if self.decays else {}
        listed: list[Any] = list(parameters)
        optimizer: Any = self.make([{"params": listed, **self.group}] if self.group else listed, **options)
        if hasattr(optimizer, "train"):  # schedule-free ones
            optimizer.train()
        return optimizer


@dataclass(frozen=True)
class Table:
    """The optimizers of one package.

    Attributes:
        classes: The names of all that the package has.
        rows: Those that are tested inside, in their variants.
        refused: Those that `SDSPreconditioner` refuses, by class name, with what builds them from a model.
        left_out: Those that are neither, with the reason.
    """

    classes: set[str]
    rows: list[Inner]
    refused: dict[str, Callable[[torch.nn.Module], Optimizer]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def row(cls: Any, label: str = "", *, group: dict[str, Any] | None = None, **options: Any) -> Inner:
    """Sorts what says something of the row from what the class takes."""
    known = {name: options.pop(name) for name in list(options) if name in Inner.__dataclass_fields__}
    return Inner(f"{cls.__name__}-{label}" if label else cls.__name__, partial(cls, **options), group or {}, **known)


def optimizers_of(*modules: ModuleType) -> set[str]:
    """The names of the optimizers in the modules, without private ones and what other packages take from torch."""
    found = {name: getattr(module, name) for module in modules for name in dir(module) if not name.startswith("_")}
    classes = {value for value in found.values() if inspect.isclass(value) and issubclass(value, Optimizer)}
    foreign = {c for c in classes if c.__module__.startswith("torch.") and torch.optim not in modules}
    return {c.__name__ for c in classes - foreign} - {"Optimizer"}
