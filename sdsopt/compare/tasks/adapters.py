"""How the embedded tasks put adapters, or trainable matrices, into a Hugging Face model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from torch import nn

from sdsopt.extras import extra


def adapt(model: nn.Module, targets: str, rank: int | None, heads: Sequence[str] = ()) -> nn.Module:
    """Makes a model trainable in the matrices that a pattern names, through LoRA or in full.

    Args:
        model: A Hugging Face model.
        targets: Pattern that the names of the linear layers to train match as a whole.
        rank: Rank of the adapters (α = 2·rank); None trains the layers' matrices themselves.
        heads: Names of the model's own modules that are fresh, and learn in every method.

    Returns:
        The model, in training mode: a PeftModel, or the given one.
    """
    if rank is None:
        for name, parameter in model.named_parameters():
            is_target = re.fullmatch(targets, name.removesuffix(".weight")) is not None
            parameter.requires_grad = is_target or name.partition(".")[0] in heads
        return model.train()
    with extra("demo"):
        from peft import LoraConfig, get_peft_model
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=list(heads) or None)
    with warnings.catch_warnings():
        # GPT-2's layers store the weight transposed: PEFT notices, and says that it did.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        # It asks transformers by a deprecated name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
