"""Measurements along a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from statistics import median
from types import TracebackType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sdsopt.corrections import Correction
from sdsopt.diagnostics.full_gradient import FullGradients
from sdsopt.engine import PairMeasurement, Recipe, StepMeasurement, measure
from sdsopt.errors import NoPairsError
from sdsopt.pairs import require_pairs

_LORA = "lora"


class Recorder:
    """Measures factors and gradients before every k-th step of an optimizer, wrapped or bare.

    What the paper measures (SDS-LoRA, arXiv 2606.16454): effective and stable rank of the gradients before (`lora`)
    and after each correction, condition numbers and spectra of the factors, ranks of ΔW, and for chosen layers the
    alignment of each correction's step with the gradient of full fine-tuning. All corrections are measured on the same
    gradients, whichever of them trains. Without a recorder none of this costs anything.

    ```python
    with Recorder(model, optimizer, ["sds", "scaled"], every=20, full_gradients="*.q_proj*") as recorder:
        train(...)
    recorder.history[-1].scalars()  # {"lora/effective_rank_A": …}: for TensorBoard, W&B and the like
    ```

    Args:
        model: The model that holds the LoRA layers.
        optimizer: The optimizer before whose steps is measured; None measures only when `measure` is called.
        corrections: Those to measure beside `lora`: names, or `Correction` instances by name.
        every: Steps between measurements.
        full_gradients: Pattern (as in a shell) of the names of linear pairs whose full gradient G is captured; each
            takes one m×n matrix in float32. None captures none.
        damping: Relative damping δ of all corrections.

    Raises:
        NoPairsError: The model has no pair, or the pattern fits none.
        UnsupportedGradientError: The pattern fits a layer that is not linear.
        ValueError: `every` is less than 1.
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
        self.history: list[Measurement] = []
        self._every = every
        self._step = 0
        self._pairs = require_pairs(model)
        chosen = dict(corrections) if isinstance(corrections, Mapping) else {name: name for name in corrections}
        self._recipes = {name: Recipe.of(c, damping, "auto") for name, c in ({_LORA: _LORA} | chosen).items()}
        watched = [pair for pair in self._pairs if full_gradients and fnmatchcase(pair.name, full_gradients)]
        if full_gradients and not watched:
            raise NoPairsError(
                f"no pair's name fits the pattern {full_gradients!r}; the first of {len(self._pairs)} is "
                f"{self._pairs[0].name}"
            )
        self._full = FullGradients(watched)
        self._hook = None if optimizer is None else optimizer.register_step_pre_hook(self._before_step)

    def measure(self) -> Measurement:
        """Measures the gradients as they are, adds that to `history` and returns it. Call it before the step."""
        measured = measure(self._pairs, self._recipes, self._full.gradients)
        self.history.append(Measurement(self._step, measured))
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

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del optimizer
        # The first argument is the optimizer itself.
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise ValueError(
                "a step with a closure computes its gradients inside, where a Recorder cannot see them; build it "
                "without the optimizer and call measure() between backward and step (Lightning: "
                "on_before_optimizer_step)"
            )
        if self._step % self._every == 0:
            self.measure()
        self._step += 1
        self._full.clear()


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
