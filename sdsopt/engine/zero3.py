"""Factors that DeepSpeed ZeRO-3 keeps in parts: what is needed of them is taken in forward, when it gathers them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sdsopt.corrections import PairTensors
from sdsopt.engine.job import Job
from sdsopt.engine.recipe import Recipe
from sdsopt.errors import StaleParametersError, UnsupportedCorrectionError
from sdsopt.pairs import LoRAPair


def is_partitioned(parameter: Parameter) -> bool:
    """Tells whether ZeRO-3 manages the parameter: outside its layer's forward and backward it is empty."""
    return hasattr(parameter, "ds_id")


class ForwardReader:
    """Reduces each partitioned factor to its r×r matrix at its layer's first forward pass after a step.

    A gradient hook fires when the partner's weights are gone again, and gathering them once more would cost
    communication in the middle of backward. This costs none, and r² numbers for each factor.

    Args:
        recipe: The correction and how it is computed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._reduced: dict[tuple[LoRAPair, str], Tensor] = {}
        self._old: set[tuple[LoRAPair, str]] = set()

    def watch(self, pair: LoRAPair) -> list[Callable[[], None]]:
        """Reads a pair's factors from now on.

        Returns:
            Functions that end it.

        Raises:
            UnsupportedCorrectionError: The correction may need more of the factors, or a diagonal is between them.
        """
        if self._recipe.correction.precondition_rows() is None or pair.path_E is not None:
            raise UnsupportedCorrectionError(
                f"DeepSpeed ZeRO-3 keeps the factors of {pair.name} in parts, and {self._recipe.correction} needs "
                "them whole beside the gradient. Use ZeRO stage 1 or 2."
            )
        return [self._watch(pair, side, path) for side, path in (("A", pair.path_A), ("B", pair.path_B))]

    def job(self, pair: LoRAPair, A: Parameter, B: Parameter) -> Job:
        """Returns the job of a pair, with what was read of it where its factors are in parts.

        Raises:
            StaleParametersError: A factor in parts was never whole in forward.
        """
        if not (is_partitioned(A) or is_partitioned(B)):
            return Job(pair, A, B)
        reduced = PairTensors(self._found(pair, "A"), self._found(pair, "B"))
        return Job(pair, _stand_in(A), _stand_in(B), reduced=reduced)

    def forget(self) -> None:
        """Makes the next forward pass read the factors anew."""
        # Until then those of the last one serve: they are of the weights that its backward pass goes through.
        self._old.update(self._reduced)

    def _found(self, pair: LoRAPair, side: str) -> Tensor:
        found = self._reduced.get((pair, side))
        if found is None:
            raise StaleParametersError(
                f"DeepSpeed ZeRO-3 keeps factor {side} of {pair.name} in parts, and it was not whole when its layer "
                "ran. Call attach(model) after deepspeed.initialize; if you did, the layer reads the factor in a way "
                "that DeepSpeed's hooks do not see: use ZeRO stage 1 or 2."
            )
        return found

    def _watch(self, pair: LoRAPair, side: str, path: str) -> Callable[[], None]:
        def read(module: nn.Module, arguments: Any) -> None:
            del module, arguments
            factor: Parameter = getattr(pair, side)
            key = pair, side
            if factor.numel() and (key in self._old or key not in self._reduced):
                self._reduced[key] = self._reduce(pair, side, factor.detach())
                self._old.discard(key)

        # DeepSpeed's own hook, which gathers, was registered before and so runs before.
        return _layer_at(pair.module, path).register_forward_pre_hook(read).remove

    def _reduce(self, pair: LoRAPair, side: str, factor: Tensor) -> Tensor:
        with torch.no_grad():
            return self._recipe.inverse_root.reduce(pair.split_A(factor).mT if side == "A" else pair.split_B(factor))


def _stand_in(parameter: Parameter) -> Tensor:
    """A tensor of the factor's true shape without its memory, in which nobody reads numbers."""
    nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
    return nothing.expand(parameter.ds_shape)  # pyright: ignore[reportAttributeAccessIssue]


def _layer_at(module: nn.Module, path: str) -> nn.Module:
    """The innermost layer on the path that is run itself, unlike the dictionaries in which PEFT keeps parameters."""
    names = path.split(".")
    owners: list[nn.Module] = [reduce(getattr, names[:depth], module) for depth in range(len(names))]
    return next(o for o in reversed(owners) if not isinstance(o, nn.ParameterDict | nn.ModuleDict))
