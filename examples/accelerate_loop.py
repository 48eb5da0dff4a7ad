"""A loop of your own with Accelerate: accumulation, clipping, mixed precision, a checkpoint, and a resumed run.

Run it: `pip install 'sdsopt[peft]' accelerate`, then `python examples/accelerate_loop.py`. It needs neither data nor a
download.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner


def build_model() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))


def train(folder: Path, correction: str, mixed_precision: str, *, epochs: int, resume: bool) -> Tensor:
    """Trains, saves after each epoch, and returns the last loss; or goes on from the checkpoint of the first epoch."""
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    model = build_model()
    tokens = torch.arange(64) % 16  # a pattern to learn
    loader = DataLoader([{"input_ids": tokens, "labels": tokens}] * 32, batch_size=4)  # pyright: ignore[reportArgumentType]  # a list is a dataset
    # docs: prepare
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model, correction)  # wrap, then prepare
    scheduler = CosineAnnealingLR(optimizer, T_max=40)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    # docs: end
    if resume:
        accelerator.load_state(str(folder / "0"))
    loss = torch.zeros(())
    for epoch in range(int(resume), epochs):
        # docs: loop
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)  # sees the raw gradients
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        # docs: end
        accelerator.save_state(str(folder / str(epoch)))
    accelerator.print(f"{correction}: loss {loss.item():.4f}")
    return loss.detach()


def main(correction: str = "sds", *, epochs: int = 4, mixed_precision: str = "no") -> tuple[Tensor, Tensor]:
    with TemporaryDirectory() as folder:
        loss = train(Path(folder), correction, mixed_precision, epochs=epochs, resume=False)
        resumed = train(Path(folder), correction, mixed_precision, epochs=epochs, resume=True)
    return loss, resumed


if __name__ == "__main__":
    main()
