"""LoRA+: a larger learning rate for B than for A, as param groups for any optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import Parameter

from sdsopt.pairs import LoRAPair, require_pairs


def lora_plus_groups(
    model: nn.Module,
    lr: float,
    ratio: float = 16.0,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Returns the trainable parameters in groups with LoRA+'s learning rates: B learns `ratio` times as fast as A.

    ```python
    optimizer = SDSPreconditioner(torch.optim.AdamW(lora_plus_groups(model, lr=1e-4)), model)
    ```

    The groups are those of PEFT's `create_loraplus_optimizer`, for pairs of every layout, without empty ones. Vectors
    (biases, norms) learn as fast as B, as there; all other parameters, such as a head's matrix, as fast as A.

    Source: LoRA+, arXiv 2402.12354, which finds a ratio of about 16 with AdamW. Corrections that already weigh B
    against A (`scaled`, `lora-pro`, `reflora`, `lora-muon`) need no such ratio.

    Args:
        model: The model that holds the LoRA layers.
        lr: Learning rate of A.
        ratio: Learning rate of B, in units of `lr`.
        weight_decay: Weight decay of all but biases and the parameters of `LayerNorm`.
        embedding_lr: Learning rate of both factors of a pair on an embedding.

    Raises:
        NoPairsError: The model has no LoRA pair.
        ValueError: `lr`, `ratio` or `embedding_lr` is not positive.
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    pairs = require_pairs(model)
    B = {id(pair.B) for pair in pairs}
    on_embeddings = {id(factor) for pair in pairs if _is_embedding(pair) for factor in (pair.A, pair.B)}
    without_decay = _without_decay(model)

    groups: dict[tuple[float, float], list[Parameter]] = {}  # (learning rate, weight decay) → parameters
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in on_embeddings:
            rate = embedding_lr
        else:
            rate = lr * ratio if id(parameter) in B or parameter.ndim == 1 else lr
        decay = 0.0 if id(parameter) in without_decay else weight_decay
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()]


def _is_embedding(pair: LoRAPair) -> bool:
    return isinstance(getattr(pair.module, "base_layer", pair.module), nn.Embedding)


def _without_decay(model: nn.Module) -> set[int]:
    biases = {id(parameter) for name, parameter in model.named_parameters() if "bias" in name}
    norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    return biases | {id(parameter) for norm in norms for parameter in norm.parameters()}
