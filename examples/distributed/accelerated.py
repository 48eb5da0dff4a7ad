"""LoRA through Accelerate; the launch's configuration says on what, and the script stays as it is.

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/distributed/accelerated.py

This is FSDP2 on two GPUs; Accelerate offers it on nothing else. For DDP on CPUs, with torchrun's processes:

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 examples/distributed/accelerated.py

It needs `pip install 'sdsopt[peft]' accelerate`.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner


def main(steps: int = 20) -> None:
    accelerator: Any = Accelerator()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model)
    model, optimizer = accelerator.prepare(model, optimizer)

    generator = torch.Generator().manual_seed(accelerator.process_index)
    for step in range(steps):
        start = torch.randint(16, (4, 1), generator=generator)
        tokens = ((start + torch.arange(24)) % 16).to(accelerator.device)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        if step in (0, steps - 1):
            kind = accelerator.distributed_type.value
            accelerator.print(f"{accelerator.num_processes} processes, {kind}, step {step:3}  loss {loss.item():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
