"""Correction in backward for as long as a Trainer trains."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdsopt.corrections import Correction
from sdsopt.diagnostics import median_condition_numbers
from sdsopt.hooks import Handle, attach
from sdsopt.linalg import InverseRoot
from sdsopt.pairs import LoRAPair, require_pairs


class SDSCallback(TrainerCallback):
    """Corrects gradients in backward (`sdsopt.attach`) for as long as a Trainer trains, whatever its optimizer is.

    ```python
    SDSCallback("sds").add_to(trainer)              # or
    Trainer(..., callbacks=[SDSCallback("sds")])
    ```

    So the Trainer's clipping sees corrected gradients. To each log of the training loss it adds the medians over all
    pairs of the condition numbers κ(A) and κ(B), as `sds/condition_A` and `sds/condition_B`. These reach the Trainer's
    `log_history`, and all callbacks that come after this one: `add_to` puts it before the loggers that `report_to`
    names, while a callback given in a list comes behind them (and before its successors in the list).

    The Trainer tells its callbacks nothing when training raises. Then the hooks stay until it trains again, or until
    `remove()`.

    Args:
        correction: A name or a `Correction` that hook mode can use; see `attach`. None corrects nothing and only
            records, for a Trainer whose optimizer corrects.
        damping: Relative damping δ ≥ 0.
        inverse_root: Method for the roots.
        max_workspace_bytes: Bound on the memory to compute with at a time, or None.
        log_conditions: Whether to record condition numbers. It costs one decomposition of each factor at each log.
    """

    def __init__(
        self,
        correction: str | Correction | None = "sds",
        *,
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        max_workspace_bytes: int | None = None,
        log_conditions: bool = True,
    ) -> None:
        self._correction = correction
        self._attach = partial(
            attach, damping=damping, inverse_root=inverse_root, max_workspace_bytes=max_workspace_bytes
        )
        self._log_conditions = log_conditions
        self._handle: Handle | None = None
        self._pairs: Sequence[LoRAPair] = ()

    def __getstate__(self) -> dict[str, Any]:
        # Trainers are copied and pickled with their callbacks; hooks and pairs belong to one model.
        return {**vars(self), "_handle": None, "_pairs": ()}

    def add_to(self, trainer: Trainer) -> SDSCallback:
        """Puts the callback before all others of the trainer, its loggers included."""
        handler = trainer.callback_handler
        handler.callbacks = [self, *(other for other in handler.callbacks if other is not self)]
        return self

    def remove(self) -> None:
        """Takes the hooks off the model, if they are on it."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None
        self._pairs = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove()  # what a run that raised has left behind
        self._pairs = require_pairs(kwargs["model"])
        if self._correction is not None:
            self._handle = self._attach(self._pairs, self._correction)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if not self._log_conditions or "loss" not in logs:
            return
        condition_A, condition_B = median_condition_numbers(self._pairs)
        conditions = {"sds/condition_A": condition_A, "sds/condition_B": condition_B}
        known = {name: value for name, value in conditions.items() if value is not None}
        logs.update(known)
        state.log_history[-1].update(known)  # the Trainer's own copy of the logs
