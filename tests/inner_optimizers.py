"""Every optimizer that the tests put inside, one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_optimizer
from torch.nn import Parameter
from torch.optim import Optimizer

Make = Callable[..., Optimizer]


@dataclass(frozen=True)
class Inner:
    """One optimizer with its options.

    Attributes:
        name: For the test's id.
        make: From parameters and, where it has one, `weight_decay`.
        decay: "none" (no such option), "l2" (added to the gradient, or a part of the update), "linear" (the same, and
            the step is linear in the gradient, so that it looks decoupled), "decoupled", or "unknowable".
        loads: Whether the bare optimizer can load its own state dict.
    """

    name: str
    make: Make
    decay: str = "l2"
    loads: bool = True

    def __call__(self, parameters: Iterable[Parameter], weight_decay: float = 0.0) -> Optimizer:
        options: dict[str, Any] = {} if self.decay == "none" else {"weight_decay": weight_decay}
        return self.make(list(parameters), **options)


def _row(cls: Any, decay: str = "l2", label: str = "", **options: Any) -> Inner:
    package = "" if cls.__module__.startswith("torch.optim") else "torch_optimizer."
    name = f"{package}{cls.__name__}{f'-{label}' if label else ''}"
    return Inner(name, partial(cls, **options), decay)


def _lookahead(parameters: list[Parameter]) -> Optimizer:
    return torch_optimizer.Lookahead(torch.optim.SGD(parameters, lr=0.01))


_IMPLEMENTATIONS: dict[str, dict[str, bool]] = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
}
_FUSED: dict[str, dict[str, bool]] = {**_IMPLEMENTATIONS, "fused": {"fused": True}}
_o = torch.optim
_t = torch_optimizer

TORCH: list[Inner] = [
    *[_row(_o.Adadelta, label=k, lr=0.1, **v) for k, v in _IMPLEMENTATIONS.items()],
    *[_row(_o.Adagrad, label=k, lr=0.01, **v) for k, v in _FUSED.items()],
    *[_row(_o.Adam, label=k, lr=0.01, **v) for k, v in _FUSED.items()],
    _row(_o.Adam, label="amsgrad", lr=0.01, amsgrad=True, capturable=False),
    _row(_o.Adam, label="decoupled", lr=0.01, decay="decoupled", decoupled_weight_decay=True),
    *[_row(_o.AdamW, label=k, lr=0.01, decay="decoupled", **v) for k, v in _FUSED.items()],
    _row(_o.AdamW, label="tensor-lr", lr=torch.tensor(0.01), decay="decoupled"),
    *[_row(_o.Adamax, label=k, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
    _row(_o.Adafactor, lr=0.01, decay="decoupled"),
    *[_row(_o.ASGD, label=k, lr=0.01, decay="linear", **v) for k, v in _IMPLEMENTATIONS.items()],
    _row(_o.Muon, lr=0.01, decay="decoupled"),
    *[_row(_o.NAdam, label=k, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
    _row(_o.NAdam, label="decoupled", lr=0.01, decay="decoupled", decoupled_weight_decay=True),
    *[_row(_o.RAdam, label=k, lr=0.01, decay="linear", **v) for k, v in _IMPLEMENTATIONS.items()],
    _row(_o.RAdam, label="decoupled", lr=0.01, decay="decoupled", decoupled_weight_decay=True),
    *[_row(_o.RMSprop, label=k, lr=0.01, **v) for k, v in _IMPLEMENTATIONS.items()],
    *[_row(_o.Rprop, label=k, lr=0.01, decay="none", **v) for k, v in _IMPLEMENTATIONS.items()],
    *[_row(_o.SGD, label=k, lr=0.01, decay="linear", **v) for k, v in _FUSED.items()],
    _row(_o.SGD, label="nesterov", lr=0.01, decay="linear", momentum=0.9, nesterov=True),
]

TORCH_OPTIMIZER: list[Inner] = [
    _row(_t.A2GradExp, decay="none", lips=10.0, beta=10.0),
    _row(_t.A2GradInc, decay="none", lips=10.0, beta=10.0),
    _row(_t.A2GradUni, decay="none", lips=10.0, beta=10.0),
    _row(_t.AccSGD, decay="linear", lr=0.01),
    _row(_t.AdaBelief, lr=0.01, weight_decouple=False),
    _row(_t.AdaBelief, label="decoupled", decay="decoupled", lr=0.01, weight_decouple=True),
    _row(_t.AdaBelief, label="fixed", decay="decoupled", lr=0.01, weight_decouple=True, fixed_decay=True),
    _row(_t.AdaBound, lr=0.01),
    _row(_t.AdaMod, decay="decoupled", lr=0.01),
    _row(_t.Adafactor, decay="decoupled", lr=0.01, relative_step=False),
    _row(_t.Adafactor, label="relative", decay="decoupled"),
    _row(_t.AdamP, decay="unknowable", lr=0.01),
    _row(_t.AggMo, decay="linear", lr=0.01),
    _row(_t.Apollo, decay="linear", lr=0.01),
    _row(_t.DiffGrad, lr=0.01),
    _row(_t.LARS, lr=0.01),
    _row(_t.Lamb, lr=0.01),
    Inner("torch_optimizer.Lookahead", _lookahead, decay="none", loads=False),
    _row(_t.MADGRAD, lr=0.01),
    _row(_t.NovoGrad, decay="linear", lr=0.01),
    _row(_t.PID, decay="linear", lr=0.01, momentum=0.9),
    _row(_t.QHAdam, lr=0.01),
    _row(_t.QHAdam, label="decoupled", decay="decoupled", lr=0.01, decouple_weight_decay=True),
    _row(_t.QHM, decay="linear", lr=0.01, momentum=0.9),
    _row(_t.QHM, label="direct", decay="decoupled", lr=0.01, momentum=0.9, weight_decay_type="direct"),
    _row(_t.RAdam, decay="decoupled", lr=0.01),
    _row(_t.Ranger, decay="decoupled", lr=0.01),
    _row(_t.RangerQH, lr=0.01),
    _row(_t.RangerVA, decay="decoupled", lr=0.01),
    _row(_t.SGDP, decay="unknowable", lr=0.01),
    _row(_t.SGDW, decay="unknowable", lr=0.01),
    _row(_t.SWATS, lr=0.01),
    _row(_t.Shampoo, lr=0.01),
    _row(_t.Yogi, lr=0.01),
]

ALL = [*TORCH, *TORCH_OPTIMIZER]

# What is refused, with the reason; the docs say the same.
REFUSED = {"torch": {"LBFGS", "SparseAdam"}, "torch_optimizer": {"Adahessian"}}
