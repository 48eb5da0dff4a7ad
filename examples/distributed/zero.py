"""LoRA on DeepSpeed ZeRO, which owns the optimizer: the gradients are corrected in backward.

    torchrun --nproc-per-node 2 examples/distributed/zero.py --stage 3

It needs `pip install 'sdsopt[peft]' deepspeed`. On CPUs, DeepSpeed compiles its collectives first.
"""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import sdsopt


def main(stage: int, steps: int = 20) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    initialize: Any = deepspeed.initialize
    engine, *_ = initialize(
        model=model,
        optimizer=torch.optim.AdamW(parameters, lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # DeepSpeed's default is 1, and would clip corrected gradients
        },
    )
    sdsopt.attach(model)  # after initialize: at stage 3 it must come after DeepSpeed's own hooks

    generator = torch.Generator().manual_seed(engine.global_rank)
    for step in range(steps):
        start = torch.randint(16, (4, 1), generator=generator)
        tokens = ((start + torch.arange(24)) % 16).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0 and step in (0, steps - 1):
            print(f"{engine.world_size} processes, ZeRO-{stage}, step {step:3}  loss {loss.item():.3f}", flush=True)
    engine.destroy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2)
    main(parser.parse_args().stage)
