"""Which part of an optimizer's step is decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sdsopt.errors import UnsupportedOptimizerError

# The names under which optimizers say whether their decay is decoupled, in the param group or on themselves.
_FLAGS = ("decoupled_weight_decay", "decouple_weight_decay", "weight_decouple", "_weight_decouple")
# AdaBelief's: the decay is a share of its own, whatever the learning rate.
_FIXED = ("fixed_decay", "_fixed_decay")
# Those that always decouple it, by class name: most come from packages that may not be installed.
_ALWAYS_DECOUPLED = {"AdaMod", "Adafactor", "Lion", "Muon", "RAdam", "Ranger", "RangerVA", "SGDW"}
# Those whose share cannot be told from outside: AdamP and SGDP scale it step by step, and torch_optimizer's SGDW
# shifts every weight by the same amount instead.
_UNKNOWABLE = {("torch_optimizer", "AdamP"), ("torch_optimizer", "SGDP"), ("torch_optimizer", "SGDW")}


def decoupled_decay(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> float | Tensor:
    """Returns the share of a parameter that the step just taken took off as decoupled weight decay.

    Such an optimizer's step is p ← (1 - share)·p + update. Where the decay is added to the gradient instead (L2, as in
    `torch.optim.SGD`), it belongs to the update and the share is 0. So it is with an optimizer that is not known.

    Args:
        optimizer: The inner optimizer, after its step.
        group: The param group of the parameter.
        parameter: The parameter.

    Returns:
        lr·weight_decay, or 0.0.
    """
    if not group.get("weight_decay") or not _is_decoupled(optimizer, group):
        return 0.0
    if _first_setting(optimizer, group, _FIXED):
        return group["weight_decay"]
    lr = group["lr"]
    if "scale_parameter" in group:  # Hugging Face's Adafactor and its like find their own rate
        lr = getattr(optimizer, "_get_lr")(group, optimizer.state[parameter])  # noqa: B009
    return lr * group["weight_decay"]


def require_separable_decay(optimizer: Optimizer, groups: Iterable[dict[str, Any]]) -> None:
    """Refuses an optimizer whose weight decay cannot be told apart from its update.

    Raises:
        UnsupportedOptimizerError: It is one of these, and a group has weight decay.
    """
    package, name = type(optimizer).__module__.partition(".")[0], type(optimizer).__name__
    if (package, name) in _UNKNOWABLE and any(group.get("weight_decay") for group in groups):
        raise UnsupportedOptimizerError(
            f"this correction maps the update without the weight decay, and {package}'s {name} decays by a share that "
            "cannot be told from outside; set weight_decay=0, or use a correction of gradients alone, such as sds"
        )


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if group.get("weight_decay_type") == "direct":  # QHM
        return True
    name = type(optimizer).__name__
    flag = _first_setting(optimizer, group, _FLAGS)
    return (name in _ALWAYS_DECOUPLED or "AdamW" in name) if flag is None else flag


def _first_setting(optimizer: Optimizer, group: dict[str, Any], names: Iterable[str]) -> bool | None:
    for name in names:
        value = group.get(name, getattr(optimizer, name, None))
        if value is not None:
            return bool(value)
    return None
