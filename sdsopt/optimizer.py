"""The wrapper around an optimizer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer, SparseAdam
from torch.profiler import record_function

from sdsopt.corrections import Correction, make_correction
from sdsopt.engine import PairMeasurement, Recipe, StepEngine, measure
from sdsopt.errors import NoPairsError, UnsupportedOptimizerError
from sdsopt.linalg import InverseRoot
from sdsopt.pairs import LoRAPair, require_pairs
from sdsopt.weight_decay import decoupled_decay, require_separable_decay

_T = TypeVar("_T")

# Optimizers that estimate the Hessian, by class name: they come from packages that may not be installed.
_NEEDS_GRAPH = {"Adahessian", "AdaHessian"}


def _with_instance_hooks(step: Callable[..., _T]) -> Callable[..., _T]:
    """Runs the step hooks registered on the wrapper; the inner `step()` runs the global ones.

    torch would wrap `step` so that both kinds run here, and the global ones a second time inside.
    """

    @functools.wraps(step)
    def hooked(self: SDSPreconditioner, *args: Any, **kwargs: Any) -> _T:
        call: tuple[tuple[Any, ...], dict[str, Any]] = ((self, *args), kwargs)
        with record_function(f"Optimizer.step#{type(self).__name__}.step"):
            for pre_hook in self._optimizer_step_pre_hooks.values():  # pyright: ignore[reportPrivateUsage]
                call = pre_hook(self, *call) or call
            result = step(*call[0], **call[1])
            for post_hook in self._optimizer_step_post_hooks.values():  # pyright: ignore[reportPrivateUsage]
                post_hook(self, *call)
        return result

    hooked.hooked = True  # pyright: ignore[reportAttributeAccessIssue]  # torch's mark: do not wrap again
    return hooked


class SDSPreconditioner(Optimizer):
    r"""Hands corrected LoRA gradients to any optimizer.

    In each `step` it factorizes the LoRA factors, undoes the singular-value scaling in their gradients, lets the inner
    optimizer step on the result, and puts the raw gradients back. Parameters that belong to no LoRA pair are the inner
    optimizer's alone. Source: SDS-LoRA, arXiv 2606.16454.

    ```python
    optimizer = SDSPreconditioner(torch.optim.AdamW(params, lr=2e-4), model)
    ```

    It is itself a `torch.optim.Optimizer`: `param_groups`, `state`, `defaults` and the state dict are the inner
    optimizer's, so a checkpoint of the bare optimizer loads into the wrapped one and the other way round. Gradients
    that are clipped between `backward` and `step` are clipped *before* the correction; see `max_grad_norm`.

    Args:
        optimizer: The inner optimizer, built on the parameters to train.
        model: The model that holds the LoRA layers, or the pairs themselves.
        correction: A name (see `available_corrections`) or a `Correction`.
        damping: Relative damping δ ≥ 0, dimensionless: M^(-p) means (M + δ·λmax(M)·I)^(-p). The default 1e-6 leaves
            factors with condition number up to about 100 as good as undamped, and bounds the gain at 1000.
        inverse_root: Method for the roots: "auto" (default: "eigh" on a CPU, "newton_schulz", which never waits for the
            device, elsewhere), "svd" (most accurate), or an `InverseRoot`.
        rescale: "grad_norm" keeps the Frobenius norm of each factor's raw gradient (grafting), so that a learning rate
            tuned for plain LoRA with SGD carries over. None (default) does not.
        max_grad_norm: Clips the norm of all gradients of a step together, as `torch.nn.utils.clip_grad_norm_` does,
            but after the correction. None (default) does not clip. Turn off the trainer's own clipping with it.

    Raises:
        DoubleCorrectionError: `sdsopt.attach` corrects the model's gradients already.
        NoPairsError: The model has no LoRA pair, or the optimizer owns none of their parameters.
        PairShapeError: Two factors of a pair do not fit together.
        UnknownCorrectionError: No correction has that name.
        UnsupportedOptimizerError: The optimizer evaluates the loss itself (LBFGS), takes sparse gradients only
            (SparseAdam), is wrapped already, or is no `torch.optim.Optimizer`; or the correction maps updates and the
            optimizer's weight decay cannot be told from its update, or it has no learning rate and the correction
            needs one.
        ValueError: `damping` is negative or not finite, `max_grad_norm` is not positive, or `inverse_root` or
            `rescale` is unknown.
    """

    # Else GradScaler would leave unscaling to the inner optimizer, which never hears of the scale.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | Iterable[LoRAPair],
        correction: str | Correction = "sds",
        *,
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        rescale: Literal["grad_norm"] | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        _check_inner(optimizer)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, or None for no clipping, got {max_grad_norm}")
        recipe = Recipe.of(correction, damping, inverse_root, rescale)
        engine = StepEngine(require_pairs(model), recipe, max_grad_norm)
        _require_mappable(optimizer, recipe.correction, optimizer.param_groups)
        if not engine.owned_pairs(optimizer.param_groups):
            raise NoPairsError(_owns_none(optimizer, engine))
        self._adopt(optimizer, engine)

    def _adopt(self, inner: Optimizer, engine: StepEngine) -> None:
        self._inner = inner
        self._engine = engine
        self._warned_no_gradient = False
        # Not `super().__init__`, which would give the wrapper groups and state of its own: this sets the hooks alone.
        super().__setstate__({})

    @property
    def inner(self) -> Optimizer:
        """The wrapped optimizer."""
        return self._inner

    @property
    def correction(self) -> Correction:
        """The correction in use."""
        return self._engine.recipe.correction

    @property
    def pairs(self) -> tuple[LoRAPair, ...]:
        """The pairs known to the wrapper, those of frozen adapters included."""
        return self._engine.pairs

    def diagnostics(self) -> dict[str, PairMeasurement]:
        """Measures the pairs and their present gradients, raw ("lora") and corrected; see `sdsopt.Recorder`.

        Call it between `backward` and `step`. It changes nothing, and costs nothing unless called.

        Returns:
            The measurements by pair name, of pairs that have a gradient; the correction's under "corrected".

        Raises:
            DoubleCorrectionError: `sdsopt.attach` has corrected the gradients already.
        """
        recipe = self._engine.recipe
        raw = dataclasses.replace(recipe, correction=make_correction("lora"))
        return measure(self.pairs, {"lora": raw, "corrected": recipe})

    @_with_instance_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Corrects the gradients and steps the inner optimizer.

        Afterwards `.grad` holds what it held before. If anything raises before the inner optimizer has stepped, no
        parameter, state or gradient has changed.

        Args:
            closure: Evaluates the model and returns the loss; called once, before the correction.

        Returns:
            The closure's loss, if there is a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decay_of = functools.partial(decoupled_decay, self._inner)
        with self._engine.corrected(self.param_groups, decay_of) as corrected:
            if not corrected:
                self._warn_no_gradient()
            self._inner.step()
        return loss

    def _warn_no_gradient(self) -> None:
        if self._warned_no_gradient or not self._engine.any_gradient(self.param_groups):
            return
        self._warned_no_gradient = True
        warnings.warn(
            f"this step corrected nothing: none of the {len(self.pairs)} LoRA pairs has a gradient, though other "
            "parameters have one. Is another adapter active, or were the LoRA layers frozen, merged or disabled?",
            stacklevel=4,
        )

    # The inner optimizer's own: `load_state_dict` and ZeRO replace these objects, so no alias would stay true.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's."""
        return self._inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's."""
        return self._inner.state

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The inner optimizer's."""
        return self._inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self._inner.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the inner optimizer."""
        _require_mappable(self._inner, self.correction, [{**self.defaults, **param_group}])
        self._inner.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, as the inner optimizer does."""
        self._inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the inner optimizer's state dict: the bare optimizer loads it as it is."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._inner.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of the wrapped or of the bare optimizer."""
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        self._inner.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getattr__(self, name: str) -> Any:
        # Public extras such as schedule-free's train() and eval(). Private ones are the inner optimizer's own business.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._inner, name)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a scheduler's patch of `step` stay behind, as with every torch optimizer.
        return {"inner": self._inner, "engine": self._engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._adopt(state["inner"], state["engine"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.correction}, {len(self.pairs)} LoRA pairs)\n{self._inner!r}"


def _check_inner(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UnsupportedOptimizerError(
            f"expected a torch.optim.Optimizer instance as first argument, got {optimizer!r}; "
            "build the optimizer first: SDSPreconditioner(torch.optim.AdamW(params, lr=2e-4), model)"
        )
    name = type(optimizer).__name__
    if isinstance(optimizer, SDSPreconditioner):
        raise UnsupportedOptimizerError("the optimizer is an SDSPreconditioner already; wrap its .inner instead")
    if isinstance(optimizer, SparseAdam):
        raise UnsupportedOptimizerError(f"{name} takes only sparse gradients, and LoRA's are dense; use Adam or AdamW")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is inspect.Parameter.empty
    if name in _NEEDS_GRAPH:
        raise UnsupportedOptimizerError(
            f"{name} differentiates the gradients a second time, and corrected ones have no graph; use AdamW or SGD"
        )
    if isinstance(optimizer, LBFGS) or needs_closure:
        raise UnsupportedOptimizerError(
            f"{name} evaluates the loss anew inside its step, after the gradients were corrected, and so would undo "
            "the correction; use an optimizer that takes one gradient a step, such as AdamW or SGD"
        )


def _require_mappable(optimizer: Optimizer, correction: Correction, groups: list[dict[str, Any]]) -> None:
    """Refuses an optimizer whose steps the correction cannot map."""
    if correction.uses_updates:
        require_separable_decay(optimizer, groups)
    if correction.uses_learning_rates and any(group.get("lr") is None for group in groups):
        raise UnsupportedOptimizerError(
            f"{correction} takes the length of its steps from the learning rate, and {type(optimizer).__name__} has "
            'no "lr" in its param groups; use an optimizer with a learning rate of its own, such as SGD with momentum'
        )


def _owns_none(optimizer: Optimizer, engine: StepEngine) -> str:
    parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    trainable = sum(pair.trainable for pair in engine.pairs)
    return (
        f"{type(optimizer).__name__} holds {parameters} parameters, none of which is a factor of the "
        f"{len(engine.pairs)} LoRA pairs of this model ({trainable} of them trainable; the first is "
        f"{engine.pairs[0].name}). Build the optimizer from this very model's parameters, after adding the adapter."
    )
