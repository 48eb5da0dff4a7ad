"""Trainers that build the optimizer by its name, from parameters alone: link the model first.

So do LitGPT, torchtune, kohya's sd-scripts and others, from a configuration file or their command line.
Run it: `pip install 'sdsopt[peft]'`, then `python examples/parameters_only.py`. It needs neither data nor a download.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import sdsopt

OPTIMIZER: dict[str, Any] = {"optimizer": "sdsopt.SDSAdamW", "arguments": {"lr": 1e-2, "correction": "sds-split"}}


def build_optimizer(parameters: Any, optimizer: str, arguments: dict[str, Any]) -> Optimizer:
    """What such a trainer does. It never shows the optimizer a model."""
    module, _, name = optimizer.rpartition(".")
    return getattr(importlib.import_module(module), name)(parameters, **arguments)


def main(optimizer_config: dict[str, Any] = OPTIMIZER, steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    base_model = LlamaForCausalLM(config)
    # docs: link
    model = get_peft_model(base_model, LoraConfig(r=8, target_modules="all-linear"))
    sdsopt.link(model)  # after the adapter, before the optimizer
    # docs: end
    optimizer = build_optimizer(model.parameters(), **optimizer_config)

    tokens = torch.arange(32).repeat(8, 2) % 16  # a pattern to learn
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{type(optimizer).__name__}: loss {losses[0]:.3f} → {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
