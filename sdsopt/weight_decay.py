"""Which part of an optimizer's step is decoupled weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

# The names under which optimizers say whether their decay is decoupled, in the param group or on themselves.
_FLAGS = ("decoupled_weight_decay", "decouple_weight_decay", "weight_decouple", "_weight_decouple")
# Those that always decouple it, by class name: some come from packages that may not be installed.
_ALWAYS_DECOUPLED = {"AdaMod", "Adafactor", "Lion", "Muon", "SGDW"}


def decoupled_decay(optimizer: Optimizer, group: dict[str, Any]) -> float | Tensor:
    """Returns the share of a parameter that one step takes off as decoupled weight decay.

    Such an optimizer's step is p ← (1 - share)·p + update. Where the decay is added to the gradient instead (L2, as in
    `torch.optim.SGD`), it belongs to the update and the share is 0.

    Args:
        optimizer: The inner optimizer.
        group: The param group of the parameter.

    Returns:
        lr·weight_decay, or 0.0.
    """
    if not group.get("weight_decay") or not _is_decoupled(optimizer, group):
        return 0.0
    return group["lr"] * group["weight_decay"]


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    for flag in _FLAGS:
        if flag in group:
            return bool(group[flag])
        if hasattr(optimizer, flag):
            return bool(getattr(optimizer, flag))
    name = type(optimizer).__name__
    return name in _ALWAYS_DECOUPLED or "AdamW" in name
