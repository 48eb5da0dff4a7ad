"""LoRA+ and corrected gradients: PEFT's optimizer, in which B learns faster than A, inside the wrapper.

Run it: `pip install 'sdsopt[peft]'`, then `python examples/loraplus.py`. It needs neither data nor a download.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))

    # A and B are in different groups, each with its learning rate. Pairs are found across groups.
    inner = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=8.0)
    optimizer = SDSPreconditioner(inner, model)
    # A schedule scales the rates of all groups alike, and so keeps their ratio.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)

    tokens = torch.arange(32).repeat(8, 2) % 16  # a pattern to learn
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            rates = sorted({group["lr"] for group in optimizer.param_groups if group["params"]})
            print(f"step {step:3}  loss {losses[-1]:.3f}  learning rates {', '.join(f'{rate:.1e}' for rate in rates)}")
    return losses


if __name__ == "__main__":
    main()
