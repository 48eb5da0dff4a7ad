"""The smallest whole example: a PEFT adapter, one wrapped optimizer, a training loop.

Run it: `pip install 'sdsopt[peft]'`, then `python examples/minimal.py`. It needs neither data nor a download.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner, find_pairs


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    print(find_pairs(model))  # what will be corrected, and what not, and why

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model)  # the one line

    tokens = torch.arange(32).repeat(8, 2) % 16  # a pattern to learn
    losses: list[float] = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
