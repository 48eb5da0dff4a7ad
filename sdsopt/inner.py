"""Which optimizers can be given corrected gradients, and whose steps can be mapped."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import ASGD, Optimizer

from sdsopt.corrections import Correction
from sdsopt.errors import UnsupportedOptimizerError
from sdsopt.nesting import built_by, nested
from sdsopt.weight_decay import require_separable_decay

_DIFFERENTIATES = "differentiates the gradients a second time, and corrected ones have no graph; use AdamW or SGD"
_EVALUATES = (
    "evaluates the loss anew inside its step, after the gradients were corrected, and so would undo the correction; "
    "use an optimizer that takes one gradient a step, such as AdamW or SGD"
)
_IN_BACKWARD = (
    "takes the gradients during backward, before its step could correct them; leave it bare and correct them in "
    "backward: sdsopt.attach(model)"
)
_CORRECTS = (
    "corrects LoRA gradients itself, so they would be corrected twice; leave it bare, or wrap a plain optimizer such "
    "as AdamW"
)

# By class name, since most come from packages that may not be installed. The signature gives others away.
_REFUSED = {
    "SDSPreconditioner": "corrects LoRA gradients already; wrap its .inner instead",
    "LoRAProAdamW": _CORRECTS,
    "LoRARite": _CORRECTS,
    "LoraFAOptimizer": _CORRECTS,
    "RiemannianPreconditionedOptimizer": _CORRECTS,
    "SparseAdam": "takes only sparse gradients, and LoRA's are dense; use Adam or AdamW",
    "Adahessian": _DIFFERENTIATES,
    "GSAM": _EVALUATES,
    "LBFGS": _EVALUATES,
    "AliG": "takes its step length from the loss, which is not handed on; use AdamW or SGD",
    "AdaLOMO": _IN_BACKWARD,
    "LOMO": _IN_BACKWARD,
    "LayerWiseDummyOptimizer": _IN_BACKWARD,
    "CPUOffloadOptimizer": _IN_BACKWARD,
}

_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"  # the module of torch's ZeroRedundancyOptimizer

# Besides following the gradients, these draw the weights towards a stored copy, an average or a norm, or keep an
# average of what they took the weights to be. torch's ASGD is one more; pytorch_optimizer's is another method.
_OWN_PULL = {
    *("A2Grad", "A2GradExp", "A2GradInc", "A2GradUni", "AccSGD", "FOCUS", "FTRL", "Fromage", "Lookahead", "MADGRAD"),
    *("Nero", "Ranger", "Ranger21", "RangerQH", "RangerVA", "SPlus", "SRMM", "TRAC"),
}


def require_usable(optimizer: Optimizer) -> None:
    """Refuses an optimizer that cannot step on corrected gradients, or has one inside that cannot.

    Raises:
        UnsupportedOptimizerError: It is one of these, or no optimizer.
    """
    if built_by(_ZERO):
        raise UnsupportedOptimizerError(
            "ZeroRedundancyOptimizer gives the optimizer that it builds a share of the parameters, so one factor of a "
            "pair may be here and the other elsewhere. Wrap that one instead: "
            "SDSPreconditioner(ZeroRedundancyOptimizer(…), model)"
        )
    if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UnsupportedOptimizerError(_no_optimizer(optimizer))
    for each in nested(optimizer):
        if reason := next((_REFUSED[name] for name in _names(each) if name in _REFUSED), None) or _needs_more(each):
            raise UnsupportedOptimizerError(f"{type(each).__name__} {reason}")
    if not hasattr(optimizer, "param_groups"):
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} has no param_groups, which every torch.optim.Optimizer must have; "
            "wrap the optimizer that is inside it"
        )


def _no_optimizer(given: object) -> str:
    if isinstance(given, type):
        what = f"the class {given.__name__} itself; build the optimizer first"
    elif isinstance(given, nn.Module):
        what = f"the model, a {type(given).__name__}: the two arguments are swapped"
    else:
        what = f"{type(given).__name__}; build the optimizer first"
    return (
        f"expected a torch.optim.Optimizer instance as first argument, got {what}: "
        "SDSPreconditioner(torch.optim.AdamW(params, lr=2e-4), model)"
    )


def require_mappable(optimizer: Optimizer, correction: Correction, groups: Sequence[dict[str, Any]]) -> None:
    """Refuses an optimizer whose steps the correction cannot map.

    Raises:
        UnsupportedOptimizerError: The correction maps steps, and those of the optimizer hold more than its answer to
            the gradients and a known weight decay; or it needs learning rates, and there are none.
    """
    if correction.uses_updates:
        _require_separable_steps(optimizer, groups)
    if correction.uses_learning_rates and any(group.get("lr") is None for group in groups):
        raise UnsupportedOptimizerError(
            f"{correction} takes the length of its steps from the learning rate, and {type(optimizer).__name__} has "
            'no "lr" in its param groups; use an optimizer with a learning rate of its own, such as SGD with momentum'
        )


def _require_separable_steps(optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    for each in nested(optimizer):
        names = _names(each)
        if isinstance(each, ASGD) or any(name in _OWN_PULL or "ScheduleFree" in name for name in names):
            raise UnsupportedOptimizerError(
                f"this correction maps the step, and {type(each).__name__}'s also draws the weights towards values of "
                "its own, or averages them: that must not be mapped; use a correction of gradients alone, such as sds"
            )
    require_separable_decay(optimizer, groups)


def _names(optimizer: Optimizer) -> list[str]:
    return [cls.__name__ for cls in type(optimizer).__mro__]


def _needs_more(optimizer: Optimizer) -> str | None:
    parameters = inspect.signature(optimizer.step).parameters
    if "hessian" in parameters:
        return _DIFFERENTIATES
    closure = parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    # Those of the SAM family evaluate the loss between a first and a second step.
    return _EVALUATES if needs_closure or hasattr(optimizer, "second_step") else None
