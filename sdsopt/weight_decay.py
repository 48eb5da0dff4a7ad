"""Which part of an optimizer's step is decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sdsopt.errors import UnsupportedOptimizerError
from sdsopt.nesting import nested

# The names under which optimizers say whether their decay is decoupled, in the param group or on themselves.
_FLAGS = (
    *("decoupled_weight_decay", "decouple_weight_decay", "weight_decouple", "_weight_decouple"),
    "decouple",  # Prodigy's
)
# AdaBelief's: the decay is a share of its own, whatever the learning rate.
_FIXED = ("fixed_decay", "_fixed_decay")
# Those that always decouple it, by class name: most come from packages that may not be installed.
_ALWAYS_DECOUPLED = {
    *("AdaMod", "Adafactor", "Conda", "DASH", "Fira", "GaLore", "Lion", "Muon", "RAdam", "SGDW", "SOAP", "SPAM"),
    *("SaRA", "StableSPAM"),
}
# bitsandbytes' own names for its methods. Its Adam decays as AdamW does.
_BITSANDBYTES_DECOUPLED = {"adam", "ademamix", "lamb", "lion"}
# Those whose share cannot be told from outside after a step, by package.
_UNKNOWABLE = {
    "torch_optimizer": {
        *("AdamP", "SGDP"),  # scale it by what their projection finds
        "SGDW",  # shifts every weight by the same amount
    },
    "pytorch_optimizer": {
        *("Adan", "DAdaptAdan"),  # divide by 1 + lr·weight_decay, or not, as a flag says
        "Magma",  # leaves out steps at random, with their decay
    },
}
# Those of which that is true where the decay is decoupled: they find its rate in each step.
_UNKNOWABLE_IF_DECOUPLED = {
    "prodigyopt": {"Prodigy"},
    "pytorch_optimizer": {
        *("APOLLO", "AdaFactor", "AdaSmooth", "AdamP", "AdamS", "DAdaptAdaGrad", "DAdaptAdam", "DAdaptLion"),
        *("DAdaptSGD", "Prodigy", "RAdam", "SGDP", "SOAP", "StableAdamW"),
    },
}


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
    optimizer = nested(optimizer)[-1]
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
        UnsupportedOptimizerError: It is one of these, or has one inside, and a group has weight decay.
    """
    decaying = [group for group in groups if group.get("weight_decay")]
    for each in nested(optimizer):
        package, name = _package(each), type(each).__name__
        unknowable = name in _UNKNOWABLE.get(package, ())
        unless_l2 = name in _UNKNOWABLE_IF_DECOUPLED.get(package, ())
        if any(unknowable or (unless_l2 and _is_decoupled(each, group)) for group in decaying):
            raise UnsupportedOptimizerError(
                f"this correction maps the update without the weight decay, and {package}'s {name} decays by a share "
                "that cannot be told from outside; set weight_decay=0, or use a correction of gradients alone, such as "
                "sds"
            )


def _package(optimizer: Optimizer) -> str:
    return type(optimizer).__module__.partition(".")[0]


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    if _package(optimizer) == "bitsandbytes":
        return getattr(optimizer, "optimizer_name", None) in _BITSANDBYTES_DECOUPLED
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
