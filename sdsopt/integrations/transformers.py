"""Hugging Face's Trainer and those built on it (TRL, Axolotl, LLaMA-Factory, ms-swift)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdsopt.corrections import Correction
from sdsopt.diagnostics.conditioning import median_condition_numbers
from sdsopt.hooks import Handle, attach
from sdsopt.linalg import InverseRoot
from sdsopt.optimizer import SDSPreconditioner


class SDSOptimizerFactory:
    """Builds the wrapped optimizer when the Trainer asks for one.

    ```python
    Trainer(..., optimizer_cls_and_kwargs=(SDSOptimizerFactory, {"lr": 2e-4, "correction": "sds"}))
    ```

    The Trainer makes a factory of any class that is no Optimizer, and calls it with the model. Its own
    `learning_rate`, `weight_decay` and `optim` arguments then have no effect (Axolotl passes its arguments on, and
    there `lr` and `weight_decay` default to them). Schedules and checkpoints work as ever.
    """

    def __call__(
        self,
        model: nn.Module,
        training_args: TrainingArguments | None = None,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimizer_cls: type[Optimizer] = AdamW,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        correction: str | Correction = "sds",
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        rescale: Literal["grad_norm"] | None = None,
        max_grad_norm: float | None = None,
    ) -> SDSPreconditioner:
        """Builds an `SDSPreconditioner` on the trainable parameters.

        Args:
            model: The model with its adapters.
            training_args: Where `lr` and `weight_decay` come from if they are not given.
            lr: Learning rate.
            weight_decay: Weight decay of the matrices; biases and norms get none. Default 0.
            optimizer_cls: The inner optimizer's class.
            optimizer_kwargs: Further arguments of that class.
            correction: As in `SDSPreconditioner`, like the options that follow.
            damping: Relative damping δ ≥ 0.
            inverse_root: Method for the roots.
            rescale: "grad_norm" or None.
            max_grad_norm: Clips corrected gradients; set the Trainer's own `max_grad_norm` to 0 with it.

        Returns:
            The optimizer.

        Raises:
            ValueError: There is no learning rate.
            NoPairsError: The model has no LoRA pair.
        """
        if training_args is not None:
            lr = training_args.learning_rate if lr is None else lr
            weight_decay = training_args.weight_decay if weight_decay is None else weight_decay
        if lr is None:
            raise ValueError('the Trainer tells a factory no learning rate; pass one: (SDSOptimizerFactory, {"lr": …})')
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
        others = [parameter for parameter in trainable if parameter.ndim < 2]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((matrices, weight_decay or 0.0), (others, 0.0))
            if parameters  # DeepSpeed fails on an empty group
        ]
        inner: Any = optimizer_cls
        return SDSPreconditioner(
            inner(groups, lr=lr, **(optimizer_kwargs or {})),
            model,
            correction,
            damping=damping,
            inverse_root=inverse_root,
            rescale=rescale,
            max_grad_norm=max_grad_norm,
        )


class SDSCallback(TrainerCallback):
    """Corrects gradients in backward (`sdsopt.attach`) for as long as a Trainer trains, whatever its optimizer is.

    ```python
    Trainer(..., callbacks=[SDSCallback("sds")])
    ```

    So the Trainer's clipping sees corrected gradients. With each log of the training loss it records the medians over
    all pairs of the condition numbers κ(A) and κ(B), under `sds/condition_A` and `sds/condition_B`: in
    `state.log_history`, and, added by `SDSCallback(…).add_to(trainer)`, through the Trainer's loggers too (a callback
    that is given in a list has no way to them).

    Args:
        correction: A name or a `Correction` that hook mode can use; see `attach`.
        damping: Relative damping δ ≥ 0.
        inverse_root: Method for the roots.
        log_conditions: Whether to record condition numbers. It costs one decomposition of each factor at each log.
    """

    def __init__(
        self,
        correction: str | Correction = "sds",
        *,
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        log_conditions: bool = True,
    ) -> None:
        self._options = (correction, damping, inverse_root)
        self._log_conditions = log_conditions
        self._handle: Handle | None = None
        self._trainer: Trainer | None = None

    def add_to(self, trainer: Trainer) -> SDSCallback:
        """Adds the callback to a trainer, and logs through it."""
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        correction, damping, inverse_root = self._options
        self._handle = attach(kwargs["model"], correction, damping=damping, inverse_root=inverse_root)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if self._handle is None or not self._log_conditions or "loss" not in logs:
            return
        condition_A, condition_B = median_condition_numbers(self._handle.pairs)
        conditions = {"sds/condition_A": condition_A, "sds/condition_B": condition_B}
        known = {name: value for name, value in conditions.items() if value is not None}
        if self._trainer is not None:
            self._trainer.log(known)
        else:
            logs.update(known)
            state.log_history[-1].update(known)
