"""A training loop by hand, with mixed precision, a schedule, clipping, and a checkpoint to go on from.

Run it: `pip install 'sdsopt[peft]'`, then `python examples/plain_loop.py`. It needs neither data nor a download, and
uses a GPU if there is one.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM

from sdsopt import SDSPreconditioner

device = "cuda" if torch.cuda.is_available() else "cpu"


class Training(NamedTuple):
    """What a checkpoint must hold."""

    model: PeftModel
    optimizer: SDSPreconditioner
    scheduler: OneCycleLR
    scaler: Any  # GradScaler: what its scale() returns is typed too widely


def build(correction: str, steps: int) -> Training:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).to(device)
    # docs: build
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model, correction)
    scheduler = OneCycleLR(optimizer, max_lr=2e-2, total_steps=steps)  # on the wrapper
    scaler = GradScaler(device)
    # docs: end
    return Training(model, optimizer, scheduler, scaler)


def train(training: Training, first: int, last: int) -> float:
    model, optimizer, scheduler, scaler = training
    loss = torch.zeros(())
    for step in range(first, last):
        tokens = (torch.arange(32).repeat(8, 2) + step).to(device) % 16  # a pattern to learn
        batch = {"input_ids": tokens, "labels": tokens}
        # docs: step
        with torch.autocast(device, torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # raw gradients; or max_grad_norm= of the wrapper
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scheduler.step()
        # docs: end
    return loss.item()


def save(training: Training, path: Path) -> None:
    model, optimizer, scheduler, scaler = training
    # docs: save
    states = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),  # what the bare AdamW would have written, and either can load it
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict(),
    }
    torch.save(states, path)
    # docs: end


def load(training: Training, path: Path) -> None:
    states: dict[str, Any] = torch.load(path, weights_only=True)
    for name, part in training._asdict().items():
        part.load_state_dict(states[name])


def main(correction: str = "sds", steps: int = 40) -> tuple[float, float]:
    half = steps // 2
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        training = build(correction, steps)
        train(training, 0, half)
        save(training, checkpoint)
        loss = train(training, half, steps)

        resumed = build(correction, steps)
        load(resumed, checkpoint)
        resumed_loss = train(resumed, half, steps)
    print(f"{correction}: loss {loss:.4f}, resumed {resumed_loss:.4f}")
    return loss, resumed_loss


if __name__ == "__main__":
    main()
