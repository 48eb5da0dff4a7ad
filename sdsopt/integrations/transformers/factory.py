"""The optimizer, built when the Trainer asks for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from sdsopt.corrections import Correction
from sdsopt.linalg import InverseRoot
from sdsopt.optimizer import SDSPreconditioner

_Choice = tuple[type[Optimizer], dict[str, Any]]

# What `Trainer.get_optimizer_cls_and_kwargs` adds for optimizers that bring their own parameters (GaLore, LOMO).
_OWN_PARAMETERS = {"params", "model", "optimizer_dict"}


class SDSOptimizerFactory:
    """Builds the wrapped optimizer when the Trainer asks for one.

    ```python
    Trainer(..., args=args, optimizer_cls_and_kwargs=(SDSOptimizerFactory, {"training_args": args}))
    ```

    With the training arguments, the inner optimizer is the one that the Trainer would have built: its `optim`,
    `learning_rate`, `weight_decay` and the like. The param groups are the Trainer's in any case, so a checkpoint of a
    bare run goes on wrapped, and back. It needs transformers ≥ 5.2, whose Trainer calls a class that is no Optimizer
    with the model; for older ones there is `SDSAdamW` after `link(model)`.
    """

    def __call__(
        self,
        model: nn.Module | None = None,
        training_args: TrainingArguments | None = None,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        optimizer_cls: type[Optimizer] | None = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        correction: str | Correction = "sds",
        damping: float = 1e-6,
        inverse_root: str | InverseRoot = "auto",
        rescale: Literal["grad_norm"] | None = None,
        max_grad_norm: float | None = None,
        transport: Literal["moments"] | None = None,
        rebalance_every: int | None = None,
        max_workspace_bytes: int | None = None,
        update_every: int = 1,
    ) -> SDSPreconditioner:
        """Builds an `SDSPreconditioner` on the trainable parameters.

        Args:
            model: The model with its adapters.
            training_args: Where the optimizer and its options come from, as far as they are not given. Axolotl passes
                them by itself; the Trainer does not.
            lr: Learning rate. Default: that of `training_args`.
            weight_decay: Weight decay of what the Trainer lets decay (no biases and norms). Default: that of
                `training_args`, or 0.
            optimizer_cls: The inner optimizer's class. Default: the one that `training_args.optim` names, or AdamW.
            optimizer_kwargs: Further arguments of that class.
            correction: As in `SDSPreconditioner`, like the options that follow.
            damping: Relative damping δ ≥ 0.
            inverse_root: Method for the roots.
            rescale: "grad_norm" or None.
            max_grad_norm: Clips corrected gradients; set the Trainer's own `max_grad_norm` to 0 with it.
            transport: "moments" or None.
            rebalance_every: Number of steps, or None.
            max_workspace_bytes: Bound on the memory to compute with at a time, or None.
            update_every: For how many steps roots serve.

        Returns:
            The optimizer.

        Warns:
            UserWarning: Gradients are clipped here and, after `training_args.max_grad_norm`, by the Trainer too.

        Raises:
            TypeError: There is no model: an instance was given to the Trainer, and not the class.
            ValueError: There is no learning rate, or `training_args.optim` is one that brings its own parameters.
            NoPairsError: The model has no LoRA pair.
        """
        if model is None:  # the Trainer calls what it is given for a factory, and that with the model
            raise TypeError(
                "the factory was called without a model. Give the Trainer the class and not an instance: "
                'optimizer_cls_and_kwargs=(SDSOptimizerFactory, {"training_args": args})'
            )
        chosen, options = _trainers_choice(training_args, model) if optimizer_cls is None else (optimizer_cls, {})
        if training_args is not None:
            lr = training_args.learning_rate if lr is None else lr
            weight_decay = training_args.weight_decay if weight_decay is None else weight_decay
            if max_grad_norm is not None and training_args.max_grad_norm:
                _warn_of_two_clippings(max_grad_norm, training_args.max_grad_norm)
        if lr is None:
            raise ValueError(
                "the Trainer tells a factory no learning rate; give it your training arguments, or a learning rate: "
                '(SDSOptimizerFactory, {"training_args": args}), or (SDSOptimizerFactory, {"lr": 2e-4})'
            )
        groups = _param_groups(model, weight_decay or 0.0)
        inner = cast("Any", chosen)(groups, lr=lr, **{**options, **(optimizer_kwargs or {})})
        return SDSPreconditioner(
            inner,
            model,
            correction,
            damping=damping,
            inverse_root=inverse_root,
            rescale=rescale,
            max_grad_norm=max_grad_norm,
            transport=transport,
            rebalance_every=rebalance_every,
            max_workspace_bytes=max_workspace_bytes,
            update_every=update_every,
        )


def _warn_of_two_clippings(corrected: float, raw: float) -> None:
    warnings.warn(
        f"gradients are clipped twice: raw ones by the Trainer, to a norm of {raw}, and corrected ones by the "
        f"optimizer, to {corrected}. Set max_grad_norm=0 in the training arguments to clip corrected gradients alone.",
        stacklevel=3,
    )


def _trainers_choice(training_args: TrainingArguments | None, model: nn.Module) -> _Choice:
    """The inner optimizer's class and options that the Trainer would have taken."""
    if training_args is None:
        return AdamW, {}
    optimizer_cls, options = Trainer.get_optimizer_cls_and_kwargs(training_args, cast("Any", model))
    if not issubclass(optimizer_cls, Optimizer) or options.keys() & _OWN_PARAMETERS:
        raise ValueError(
            f"optim={OptimizerNames(training_args.optim).value} chooses the parameters that it trains by itself, so it "
            "cannot be wrapped here; set another optim, or pass optimizer_cls"
        )
    return optimizer_cls, {name: value for name, value in options.items() if name != "lr"}


def _param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The Trainer's two groups, also where the second is empty: else checkpoints of a bare run would not fit."""
    # A method that uses nothing of its object; ms-swift calls it so, too.
    decaying = set(Trainer.get_decay_parameter_names(cast("Any", None), model))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [p for name, p in trainable if name in decaying], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if name not in decaying], "weight_decay": 0.0},
    ]
