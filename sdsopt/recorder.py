"""Measurements along a training run."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from statistics import median
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sdsopt.corrections import Correction
from sdsopt.diagnostics.full_gradient import FullGradients
from sdsopt.diagnostics.names import name_fits
from sdsopt.engine import PairMeasurement, Recipe, StepMeasurement, measure
from sdsopt.errors import NoPairsError, UnsupportedOptimizerError
from sdsopt.nesting import callers, nested
from sdsopt.optimizer import SDSPreconditioner
from sdsopt.pairs import LoRAPair, require_pairs

_LORA = "lora"
_WRAPPERS_STEP = inspect.unwrap(SDSPreconditioner.step).__code__
_NEVER_CALLED = (
    "it was built without an optimizer (a Trainer's is None until trainer.create_optimizer()), and measure() was not "
    "called between backward and step"
)
_NO_STEP = (
    "its optimizer made no step on gradients of the model's LoRA layers; give it the one that steps, or none and call "
    "measure() between backward and step"
)


class Recorder:
    """Measures factors and gradients before every k-th step of an optimizer, wrapped or bare.

    What the paper measures (SDS-LoRA, arXiv 2606.16454): effective and stable rank of the gradients before (`lora`)
    and after each correction, condition numbers and spectra of the factors, ranks of ΔW, and for chosen layers the
    alignment of each correction's step with the gradient of full fine-tuning. All corrections are measured on the same
    gradients, whichever of them trains. Without a recorder none of this costs anything.

    ```python
    with Recorder(model, optimizer, ["sds", "scaled"], every=20, full_gradients="q_proj") as recorder:
        train(...)
    recorder.history[-1].scalars()  # {"lora/effective_rank_A": …}: for TensorBoard, W&B and the like
    ```

    Corrections that count steps or remember gradients (`altlora`, `lora-rite-matrix`) are measured as in a first step;
    `optimizer.diagnostics()` measures the wrapper's own as in the next one. A step that a GradScaler skips is not seen:
    its G is added to that of the next one.

    Args:
        model: The model that holds the LoRA layers.
        optimizer: The optimizer before whose steps is measured, or Accelerate's around it. None measures only when
            `measure` is called: call it before each step.
        corrections: Those to measure beside `lora`: a name, names, or `Correction` instances by name.
        every: Steps between measurements; without an optimizer it has no effect.
        full_gradients: Name of the linear pair whose full gradient G is captured, or any part of the names of several,
            with * and ?; each takes one m×n matrix in float32, and its product in the steps that are measured. None
            captures none.
        damping: Relative damping δ of all corrections.

    Raises:
        NoPairsError: The model has no pair, or the pattern fits none.
        UnsupportedGradientError: The pattern fits a layer that is not linear, or that has DoRA.
        UnsupportedOptimizerError: The optimizer takes no hooks; or, when it steps, it is the one inside an
            `SDSPreconditioner`, whose gradients are corrected already.
        ValueError: `every` is less than 1.

    Warns:
        UserWarning: The `with` block ends without a measurement.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        corrections: Sequence[str] | Mapping[str, Correction] = ("sds",),
        *,
        every: int = 1,
        full_gradients: str | None = None,
        damping: float = 1e-6,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        target = None if optimizer is None else _hookable(optimizer)
        self.history: list[Measurement] = []
        self._every = every
        self._step = 0
        self._pairs = require_pairs(model)
        if isinstance(corrections, str):
            corrections = [corrections]
        chosen = dict(corrections) if isinstance(corrections, Mapping) else {name: name for name in corrections}
        self._recipes = {name: Recipe.of(c, damping, "auto") for name, c in ({_LORA: _LORA} | chosen).items()}
        # Refuses before it puts on a hook, so that an error here leaves nothing behind.
        self._full = FullGradients(_named(self._pairs, full_gradients))
        self._hook = None if target is None else target.register_step_pre_hook(self._before_step)

    def measure(self) -> Measurement:
        """Measures the gradients as they are, adds that to `history` and returns it. Call it before the step.

        Without an optimizer it counts as a step, and the full gradients are summed anew afterwards. With one, they are
        there in the steps that `every` chooses.
        """
        measured = measure(self._pairs, self._recipes, self._full.gradients)
        self.history.append(Measurement(self._step, measured))
        if self._hook is None:
            self._finish_step()
        return self.history[-1]

    def remove(self) -> None:
        """Ends the recording; `history` stays."""
        if self._hook is not None:
            self._hook.remove()
        self._full.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()
        if kind is None and not any(measurement.pairs for measurement in self.history):
            why = _NEVER_CALLED if self._hook is None else _NO_STEP
            warnings.warn(f"this Recorder measured nothing: {why}", stacklevel=2)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first argument is the optimizer itself.
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise ValueError(
                "a step with a closure computes its gradients inside, where a Recorder cannot see them; build it "
                "without the optimizer and call measure() between backward and step (Lightning: "
                "on_before_optimizer_step)"
            )
        if self._step % self._every == 0:
            _require_raw_gradients(optimizer)
            self.measure()
        self._finish_step()
        self._full.paused = self._step % self._every != 0

    def _finish_step(self) -> None:
        self._step += 1
        self._full.clear()


def _named(pairs: Sequence[LoRAPair], pattern: str | None) -> list[LoRAPair]:
    """Returns the pair of that name, or else all whose names the pattern fits."""
    if pattern is None:
        return []
    found = [pair for pair in pairs if pair.name == pattern] or [p for p in pairs if name_fits(p.name, pattern)]
    if not found:
        raise NoPairsError(
            f"no pair's name fits the pattern {pattern!r}, which may be any part of a name, with the wildcards * and "
            f"?; the first of {len(pairs)} is {pairs[0].name}"
        )
    return found


def _hookable(optimizer: Optimizer) -> Optimizer:
    """Returns the optimizer, or the first inside it that has step hooks: Accelerate's has none of its own."""
    for each in nested(optimizer):
        if hasattr(each, "_optimizer_step_pre_hooks"):
            return each
    raise UnsupportedOptimizerError(
        f"{type(optimizer).__name__} takes no step hooks; build the Recorder without the optimizer and call measure() "
        "between backward and step"
    )


def _require_raw_gradients(optimizer: Optimizer) -> None:
    # Only who calls the step tells that an optimizer is inside a wrapper. Those of the wrapper itself are run before.
    if any(frame.f_code is _WRAPPERS_STEP for frame in callers()):
        raise UnsupportedOptimizerError(
            f"this {type(optimizer).__name__} steps inside an SDSPreconditioner, so the gradients that it is given are "
            "corrected already; give the Recorder the SDSPreconditioner itself"
        )


class Measurement:
    """All pairs at one step.

    Args:
        step: The number of steps taken before.
        pairs: The measurements by pair name.
    """

    def __init__(self, step: int, pairs: Mapping[str, PairMeasurement]) -> None:
        self.step = step
        self.pairs = pairs

    def scalars(self) -> dict[str, float]:
        """Returns medians over the pairs, by name: of the factors, and of each correction as "sds/alignment".

        What is not finite, or was not measured, is left out.
        """
        columns = {
            name: [getattr(pair, name) for pair in self.pairs.values()]
            for name in ("condition_A", "condition_B", "stable_rank", "effective_rank")
        }
        for correction in next(iter(self.pairs.values())).steps if self.pairs else ():
            for field in fields(StepMeasurement):
                values = [getattr(pair.steps[correction], field.name) for pair in self.pairs.values()]
                columns[f"{correction}/{field.name}"] = values
        known = {name: [v for v in values if v is not None and math.isfinite(v)] for name, values in columns.items()}
        return {name: median(values) for name, values in known.items() if values}
