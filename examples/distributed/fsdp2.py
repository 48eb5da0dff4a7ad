"""LoRA on FSDP2, with a checkpoint in which any number of processes goes on.

    torchrun --nproc-per-node 2 examples/distributed/fsdp2.py --checkpoint run
    torchrun --nproc-per-node 1 examples/distributed/fsdp2.py --checkpoint run

The second command resumes what the first one saved. It needs `pip install 'sdsopt[peft]'`, and runs on CPUs too.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner, shard_placements


def build() -> tuple[Any, SDSPreconditioner]:
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    # A cut across its columns needs no exchange when gradients are corrected. Without this argument it works as well.
    placement = shard_placements(model, dist.get_world_size())
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model)


def states(model: Any, optimizer: SDSPreconditioner) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer}


def main(checkpoint: Path, steps: int = 20) -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    model, optimizer = build()
    if (checkpoint / ".metadata").exists():
        stored = states(model, optimizer)
        load(stored, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(steps):
        start = torch.randint(16, (4, 1), generator=generator)
        tokens = (start + torch.arange(24)) % 16  # a pattern to learn; every process has its own examples
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step in (0, steps - 1):
            print(f"{dist.get_world_size()} processes, step {step:3}  loss {loss.item():.3f}", flush=True)
    save(states(model, optimizer), checkpoint_id=checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    main(parser.parse_args().checkpoint)
