"""Optimizers around optimizers, such as Lookahead around AdamW."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

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
    return any(frame.f_globals.get("__name__") == module_name for frame in callers())


def callers() -> Iterator[FrameType]:
    """Yields the frames of the code that runs, innermost first.

    Do not ask them for f_locals: Python 3.11 keeps what that returns, and so a caller's models, for as long as the
    caller runs.
    """
    frame = sys._getframe().f_back  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        yield frame
        frame = frame.f_back
