"""Optimizers around optimizers, such as Lookahead around AdamW."""

from __future__ import annotations

import sys

from torch.optim import Optimizer

# Where they keep the one inside: Lookahead and its like, those of the SAM family, schedule-free wrappers.
_ATTRIBUTES = ("optimizer", "base_optimizer", "base")


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizer and those that it wraps, outermost first."""
    values = (vars(optimizer).get(name) for name in _ATTRIBUTES)
    inside = next((value for value in values if isinstance(value, Optimizer)), None)
    return [optimizer] if inside is None else [optimizer, *nested(inside)]


def built_by(module_name: str) -> bool:
    """Tells whether the code that runs was called from within the module of this name."""
    frame = sys._getframe()  # pyright: ignore[reportPrivateUsage]
    # Not by f_locals: Python 3.11 keeps what it returns, and so the caller's models, for as long as the caller runs.
    while (frame := frame.f_back) is not None:
        if frame.f_globals.get("__name__") == module_name:
            return True
    return False
