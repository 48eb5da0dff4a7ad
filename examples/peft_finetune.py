"""Fine-tuning with PEFT as in practice: a schedule, clipping, a checkpoint, and a resumed run that ends the same.

A small ViT that was pretrained on the digits 0-4 (by `sdsopt compare`'s task) learns 5-9 with LoRA.
Run it: `pip install 'sdsopt[demo]'`, then `python examples/peft_finetune.py`.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from sdsopt import SDSPreconditioner
from sdsopt.compare import DigitsTask

Training = tuple[nn.Module, SDSPreconditioner, torch.optim.lr_scheduler.LRScheduler]


def build(task: DigitsTask, correction: str, steps: int) -> Training:
    torch.manual_seed(0)
    model = task.build_model(rank=8)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(torch.optim.AdamW(parameters, lr=5e-3), model, correction)
    # Schedulers are built on the wrapper, like everything that expects an optimizer.
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def train(task: DigitsTask, training: Training, first: int, last: int) -> float:
    model, optimizer, scheduler = training
    loss = torch.zeros(())
    for batch in islice(task.batches(seed=0), first, last):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # sees the raw gradients
        optimizer.step()
        scheduler.step()
    return loss.item()


def save(training: Training, path: Path) -> None:
    model, optimizer, scheduler = training
    # The optimizer's part is what the bare AdamW would have written, and either can load it.
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(states, path)


def load(training: Training, path: Path) -> None:
    states = torch.load(path, weights_only=True)
    for part, name in zip(training, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(states[name])


def main(correction: str = "sds", steps: int = 100) -> tuple[float, float]:
    task = DigitsTask()
    task.prepare()
    half = steps // 2
    with TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint.pt"
        training = build(task, correction, steps)
        train(task, training, 0, half)
        save(training, checkpoint)
        loss = train(task, training, half, steps)

        resumed = build(task, correction, steps)
        load(resumed, checkpoint)
        resumed_loss = train(task, resumed, half, steps)
    with torch.no_grad():
        accuracy = task.evaluate(training[0].eval())
    print(f"{correction}: loss {loss:.4f}, resumed {resumed_loss:.4f}, held-out accuracy {accuracy:.1%}")
    return loss, resumed_loss


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--correction", default="sds")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    main(arguments.correction, arguments.steps)
