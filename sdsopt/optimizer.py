"""The wrapper around an optimizer."""

from __future__ import annotations

import dataclasses
import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import record_function

from sdsopt.bypass import BypassWatch
from sdsopt.corrections import Correction, make_correction
from sdsopt.engine import PairMeasurement, Recipe, StepEngine, measure
from sdsopt.engine.between_steps import steps_taken
from sdsopt.errors import NoPairsError
from sdsopt.inner import require_mappable, require_usable
from sdsopt.linalg import InverseRoot
from sdsopt.moments import moments_of, require_known_moments, require_moments
from sdsopt.options import require_number
from sdsopt.pairs import LoRAPair, find_pairs, live, require_pairs
from sdsopt.weight_decay import decoupled_decay

_T = TypeVar("_T")


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

    A step holds a copy of the LoRA parameters' gradients, and with a correction that maps updates one of their values
    besides; then a few megabytes on a CPU, or a few hundred on another device, to compute with. On a CPU the copies
    stay until the next step writes over them.

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
        transport: "moments" lets the inner optimizer's momentum and second moments follow the bases in which it is
            given gradients, from step to step (see `TrackBasis`). None (default) does so only where the correction is
            defined with it, as "altlora" is. It doubles the r×r work of a step.
        rebalance_every: After how many steps A and B are replaced by balanced factors of the same product, with the
            moments carried along. None (default) leaves them. Do not average such factors over steps (EMA).
        max_workspace_bytes: What a step may take to compute with at a time, beyond what it holds as said above and the
            r×r matrices of all pairs. What one pair needs is the least there is: with "sds", "scaled" and "sds-split"
            a few copies of it. Less memory takes more calls. None (default) bounds nothing.
        update_every: For how many steps the roots of a pair serve. 1 (default): each step has its own. More saves their
            time and makes the correction inexact, see docs/performance.md. They are computed where the number of steps
            is a multiple of it, so a run that is saved there resumes bit for bit; see also `refresh`. Give one
            optimizer both factors of a pair: another one's steps make roots old.

    Raises:
        DoubleCorrectionError: `sdsopt.attach` corrects the model's gradients already.
        NoPairsError: The model has no LoRA pair, or the optimizer owns none of their parameters, or all that it owns
            are frozen.
        PairShapeError: Two factors of a pair do not fit together.
        TypeError: An option is of another type, such as text or a float where an integer is needed; or `model` is
            neither a module nor a collection of pairs.
        UnknownCorrectionError: No correction has that name.
        UnsupportedCorrectionError: `transport` or `rebalance_every` with a correction or a pair that has no bases to
            follow; or `update_every` with a correction that needs the roots of every step, or none.
        UnsupportedOptimizerError: The optimizer evaluates the loss itself (LBFGS, SAM), differentiates twice
            (SophiaH), takes sparse gradients only (SparseAdam), corrects LoRA gradients itself, or is no
            `torch.optim.Optimizer`; or the correction maps the optimizer's step, and this holds more than can be told
            apart (schedule-free ones, Prodigy with weight decay), or the correction needs a learning rate and the
            optimizer has none; or moments are to be carried, and it is not known which the optimizer keeps; or torch's
            ZeroRedundancyOptimizer builds this one, instead of being wrapped by it.
        ValueError: `damping` is negative or not finite, `max_grad_norm`, `rebalance_every`, `max_workspace_bytes` or
            `update_every` is not positive, or `inverse_root`, `rescale` or `transport` is unknown.
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
        transport: Literal["moments"] | None = None,
        rebalance_every: int | None = None,
        max_workspace_bytes: int | None = None,
        update_every: int = 1,
    ) -> None:
        require_usable(optimizer)
        if max_grad_norm is not None:
            require_number(
                "max_grad_norm", max_grad_norm, "a positive number, or None for no clipping", lambda norm: norm > 0
            )
        recipe = Recipe.of(
            correction,
            damping,
            inverse_root,
            rescale,
            transport,
            rebalance_every,
            max_workspace_bytes,
            update_every,
        )
        engine = StepEngine(require_pairs(model), recipe, max_grad_norm)
        require_mappable(optimizer, recipe.correction, optimizer.param_groups)
        if recipe.tracks_bases:
            require_known_moments(optimizer)
        if transport is not None:
            require_moments(optimizer)
        owned = engine.owned_pairs(optimizer.param_groups)
        if not owned:
            raise NoPairsError(_owns_none(optimizer, engine))
        if not any(pair.trainable for pair in owned):
            raise NoPairsError(_all_frozen(owned))
        self._adopt(optimizer, engine)
        if isinstance(model, nn.Module):
            self._model = weakref.ref(model)

    def _adopt(self, inner: Optimizer, engine: StepEngine) -> None:
        self._inner = inner
        self._engine = engine
        self._model: weakref.ref[nn.Module] | None = None
        self._warned_no_gradient = False
        self._watch = BypassWatch(self, inner)
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

    def refresh(self) -> None:
        """Makes the next step compute the roots of all pairs, where `update_every` lets older ones serve.

        For when the factors were changed by something else than a step or `load_state_dict`. In one process, such a
        change is noticed by itself, unless it writes through ``.data`` or the step is compiled. Call it on all
        processes.
        """
        self._engine.forget_roots()

    def diagnostics(self) -> dict[str, PairMeasurement]:
        """Measures the pairs and their present gradients, raw ("lora") and corrected; see `sdsopt.Recorder`.

        Call it between `backward` and `step`. It changes nothing, and costs nothing unless called. A correction that
        counts steps, or remembers gradients, is measured as in the step to come; but always with the roots of the
        present factors, also where `update_every` lets older ones serve.

        Returns:
            The measurements by pair name, of pairs that have a gradient; the correction's under "corrected".

        Raises:
            DoubleCorrectionError: `sdsopt.attach` has corrected the gradients already.
        """
        recipe = self._engine.recipe
        raw = dataclasses.replace(recipe, correction=make_correction("lora"))
        recipes = {"lora": raw, "corrected": recipe}
        return measure(self.pairs, recipes, step=steps_taken(self.param_groups), state=self.state)

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
        self._watch.has_stepped = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        decay_of = functools.partial(decoupled_decay, self._inner)
        known_moments = functools.partial(moments_of, self._inner)
        with self._engine.corrected(self.param_groups, decay_of, known_moments, self.state) as corrected:
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
        """Adds a group to the inner optimizer, and takes in the pairs that came into the model meanwhile.

        These are looked for in the model that the wrapper was built with (with `SDSAdamW` and `SDSSGD`, in the linked
        models). A wrapper that was given pairs, or was copied, knows no model: it corrects the pairs that it has.

        Args:
            param_group: As for any optimizer.

        Raises:
            PairShapeError: Two factors of a pair do not fit together; as for the wrapper itself, like the following.
            DoubleCorrectionError: `sdsopt.attach` corrects the group's gradients already.
            UnsupportedCorrectionError: `transport` or `rebalance_every` with a pair that has no bases to follow.
            StaleParametersError: A factor that was in the model is gone.
            UnsupportedOptimizerError: The correction maps steps, and those of this group hold more than can be told
                apart.
        """
        require_mappable(self._inner, self.correction, [{**self.defaults, **param_group}])
        if isinstance(param_group["params"], Iterator):  # can be read once, and is read here and there
            param_group["params"] = list(param_group["params"])
        groups = [*self.param_groups, {"params": _parameters(param_group)}]
        engine = self._engine
        known = {pair.address for pair in engine.pairs}
        pairs = (*engine.pairs, *(pair for pair in self._present_pairs(groups) if pair.address not in known))
        StepEngine(pairs, engine.recipe).owned_pairs(groups)  # another engine: what fails here changes nothing
        self._inner.add_param_group(param_group)
        engine.pairs = pairs
        engine.owned_pairs(self.param_groups)

    def _present_pairs(self, param_groups: list[dict[str, Any]]) -> Iterable[LoRAPair]:
        """The pairs that are there now for these groups, as far as that is known."""
        model = None if self._model is None else self._model()
        return () if model is None else find_pairs(model, include_frozen=True)

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
        self._engine.forget_roots()
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
        return f"{type(self).__name__}({self.correction}, {self._how_many()})\n{self._inner!r}"

    def _how_many(self) -> str:
        """How many pairs are corrected, of those that are trainable."""
        owned = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        trainable = [[factor for factor in factors if factor.requires_grad] for _, *factors in live(self.pairs)]
        trained = [any(id(factor) in owned for factor in factors) for factors in trainable if factors]
        share = "" if all(trained) else f"{sum(trained)} of "
        return f"{share}{len(trained)} LoRA pair{'' if len(trained) == 1 else 's'}"


def _parameters(param_group: dict[str, Any]) -> list[Tensor]:
    """The parameters of a group as a user gives it: one alone, several, or several with names."""
    given = param_group["params"]
    if isinstance(given, Tensor):
        return [given]
    return [each[1] if isinstance(each, tuple) else each for each in given]


def _owns_none(optimizer: Optimizer, engine: StepEngine) -> str:
    parameters = sum(len(group["params"]) for group in optimizer.param_groups)
    trainable = sum(pair.trainable for pair in engine.pairs)
    return (
        f"{type(optimizer).__name__} holds {parameters} parameters, none of which is a factor of the "
        f"{len(engine.pairs)} LoRA pairs of this model ({trainable} of them trainable; the first is "
        f"{engine.pairs[0].name}). Build the optimizer from this very model's parameters, after adding the adapter."
    )


def _all_frozen(owned: list[LoRAPair]) -> str:
    return (
        f"all {len(owned)} LoRA pairs of this optimizer are frozen (the first is {owned[0].name}), so its steps would "
        "change none of them. Make the adapter trainable first: PeftModel.from_pretrained(…, is_trainable=True), or "
        "model.set_adapter(name). If it shall rest for some steps only, freeze it after wrapping the optimizer."
    )
