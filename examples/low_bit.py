"""Optimizer state in 8 or 4 bits, and corrected gradients: bitsandbytes or torchao inside the wrapper.

Run it: `pip install 'sdsopt[peft]' bitsandbytes torchao`, then `python examples/low_bit.py`, or with the classes to
compare: `python examples/low_bit.py torchao.optim.AdamW4bit` (which first compiles its step, on a CPU for a minute or
two). It needs neither data nor a GPU.
"""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner


def build(hidden_size: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    # A state has few bits from 4096 elements on: a factor of rank 16 needs 256 rows or columns.
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, target_modules="all-linear"))


def train(inner: Any, steps: int, hidden_size: int) -> tuple[list[float], Optimizer]:
    model = build(hidden_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(inner(parameters, lr=1e-2), model)  # as around any other optimizer
    tokens = torch.arange(32).repeat(8, 2) % 16  # a pattern to learn
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer


def checkpoint_size(optimizer: Optimizer) -> int:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    return len(buffer.getvalue())


def main(names: list[str], steps: int = 30, hidden_size: int = 256) -> dict[str, tuple[list[float], int]]:
    results: dict[str, tuple[list[float], int]] = {}
    for name in names:
        module, _, cls = name.rpartition(".")
        losses, optimizer = train(getattr(import_module(module), cls), steps, hidden_size)
        results[name] = losses, checkpoint_size(optimizer)
        print(f"{name:28} loss {losses[0]:.2f} → {losses[-1]:.2f}, optimizer.pt {results[name][1] / 2**10:5.0f} KiB")
    return results


if __name__ == "__main__":
    main(["torch.optim.AdamW", *(sys.argv[1:] or ["bitsandbytes.optim.AdamW8bit"])])
