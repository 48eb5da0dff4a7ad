"""Optimizers around optimizers, such as Lookahead around AdamW."""

from __future__ import annotations

from torch.optim import Optimizer

# Where they keep the one inside: Lookahead and its like, those of the SAM family, schedule-free wrappers.
_ATTRIBUTES = ("optimizer", "base_optimizer", "base")


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizer and those that it wraps, outermost first."""
    values = (vars(optimizer).get(name) for name in _ATTRIBUTES)
    inside = next((value for value in values if isinstance(value, Optimizer)), None)
    return [optimizer] if inside is None else [optimizer, *nested(inside)]
