"""The share that the correction has in a whole training step."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.optim import AdamW

from sdsopt.bench.settings import DTYPES
from sdsopt.bench.timing import Stopwatch
from sdsopt.extras import extra
from sdsopt.optimizer import SDSPreconditioner

TOKENS = 512
_CORRECTIONS = ("sds", "sds-split", "scaled")


@dataclass(frozen=True)
class Share:
    """What a training step of one Llama-3-8B block consists of.

    Attributes:
        correction: Its name.
        rank: r.
        dtype: Of all parameters.
        tokens: In the batch.
        step_seconds: Median time of forward, backward and bare AdamW.
        correction_seconds: Median time that the wrapper's step takes beyond AdamW's.
        share: Median of correction / (step + correction).
    """

    correction: str
    rank: int
    dtype: str
    tokens: int
    step_seconds: float
    correction_seconds: float
    share: float


def measure_share(rank: int, dtype: str, rounds: int, stopwatch: Stopwatch) -> list[Share]:
    """Trains a real block of true dimensions on random tokens, and times its parts side by side.

    Raises:
        MissingExtraError: transformers or peft is missing.
    """
    device = stopwatch.device
    model: Any = _build(rank, DTYPES[dtype], device)
    hidden = torch.randn(1, TOKENS, model.config.hidden_size, dtype=DTYPES[dtype], device=device)
    adamw = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)
    wrappers = {name: SDSPreconditioner(adamw, model, name) for name in _CORRECTIONS}

    def gradients() -> None:
        model.zero_grad()
        model(inputs_embeds=hidden).last_hidden_state.float().square().mean().backward()

    bare: list[float] = []
    corrections: dict[str, list[float]] = {name: [] for name in wrappers}
    for attempt in range(rounds + 1):
        whole = stopwatch.seconds(gradients)
        step = stopwatch.seconds(adamw.step)
        found = {name: stopwatch.seconds(wrapper.step) - step for name, wrapper in wrappers.items()}
        if attempt:  # the first one allocates the optimizer's state
            bare.append(whole + step)
            for name, seconds in found.items():
                corrections[name].append(seconds)
    return [
        Share(
            correction=name,
            rank=rank,
            dtype=dtype,
            tokens=TOKENS,
            step_seconds=median(bare),
            correction_seconds=median(own),
            share=median(c / (b + c) for c, b in zip(own, bare, strict=True)),
        )
        for name, own in corrections.items()
    ]


def _build(rank: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    with extra("demo"):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaModel
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        use_cache=False,
    )
    model: Any = LlamaModel(config)
    model.to(device, dtype)
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)  # from zero there would be nothing to decompose
    return adapted
