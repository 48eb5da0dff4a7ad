"""Which tensors of an optimizer's state are moments of the gradients it was given."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from sdsopt.errors import UnsupportedOptimizerError

_FIRST = ("exp_avg", "momentum_buffer")
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
# Those that keep nothing else of a gradient's shape, by package; subclasses count as what they extend. Others keep
# copies of the weights, factored or quantised moments, or maxima, of which none can be carried to another basis.
_KNOWN = {
    "torch": {"Adam", "AdamW", "Muon", "NAdam", "RAdam", "SGD"},
    "torch_optimizer": {"RAdam"},
    "pytorch_optimizer": {"Lion"},
    "lion_pytorch": {"Lion"},
}


class Moments(NamedTuple):
    """What an optimizer remembers of one parameter's gradients, in the parameter's shape.

    Attributes:
        first: Averages or sums of gradients.
        second: Averages of their squares, element by element.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]


def moments_of(optimizer: Optimizer, parameter: Tensor) -> Moments:
    """Returns the moments that there are: none before the optimizer's first step."""
    state = optimizer.state.get(parameter, {})
    first, second = (tuple(state[name] for name in names if state.get(name) is not None) for names in (_FIRST, _SECOND))
    return Moments(first, second)


def require_known_moments(optimizer: Optimizer) -> None:
    """Refuses an optimizer of which it is not known what it remembers.

    Raises:
        UnsupportedOptimizerError: It is one of these.
    """
    if not any(cls.__name__ in _KNOWN.get(cls.__module__.partition(".")[0], ()) for cls in type(optimizer).__mro__):
        raise UnsupportedOptimizerError(
            f"carrying moments to another basis (transport, rebalance_every, altlora) needs to know what an optimizer "
            f"remembers, and {type(optimizer).__module__}.{type(optimizer).__name__} is not among those known: "
            + ", ".join(f"{package}'s {', '.join(sorted(names))}" for package, names in _KNOWN.items())
            + ". Take one of these, or leave it out: transport=None, AltLoRA(project_momentum=False)"
        )


def require_moments(optimizer: Optimizer) -> None:
    """Refuses an optimizer of which it is known that it will remember nothing.

    Raises:
        UnsupportedOptimizerError: It is SGD without momentum.
    """
    if not any(group.get("momentum", 1) for group in optimizer.param_groups):
        raise UnsupportedOptimizerError(
            f"{type(optimizer).__name__} without momentum keeps no moments, so there is nothing to carry from one "
            "basis to the next; give it momentum, or leave transport out"
        )
