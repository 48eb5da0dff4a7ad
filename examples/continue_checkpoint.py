"""Goes on with a checkpoint that bare AdamW made, under the correction: the same adapter, moments and schedule.

Run it: `pip install 'sdsopt[peft,cli]' accelerate`, then `python examples/continue_checkpoint.py`.
It needs neither data nor a download.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sdsopt import SDSPreconditioner
from sdsopt.adapters import inspect_adapter


# docs: trainer
class SDSTrainer(Trainer):
    """Wraps the optimizer that the Trainer itself builds, so that its `optimizer.pt` fits, group by group."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if not isinstance(optimizer, SDSPreconditioner):
            self.optimizer = optimizer = SDSPreconditioner(optimizer, self.model)  # pyright: ignore[reportArgumentType]
        return optimizer


# docs: end


class Pattern(Dataset[dict[str, torch.Tensor]]):
    """Sixteen tokens that repeat, from a start of its own for each example."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(48) + index) % 16
        return {"input_ids": tokens, "labels": tokens}


def build_model() -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))


def train(kind: type[Trainer], folder: Path, steps: int, resume: Path | None = None) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=steps // 2,
        logging_steps=steps // 2,
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = kind(build_model(), arguments, train_dataset=Pattern())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def main(folder: Path, steps: int = 40) -> tuple[Trainer, Trainer]:
    bare = train(Trainer, folder / "bare", steps)
    checkpoint = folder / "bare" / f"checkpoint-{steps // 2}"
    print(inspect_adapter(checkpoint).verdict.text)

    corrected = train(SDSTrainer, folder / "corrected", steps, resume=checkpoint)
    for name, trainer in (("bare to the end", bare), ("corrected from half-way", corrected)):
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{name:24} mean loss of the first half {losses[0]:.3f}, of the second {losses[1]:.3f}")
    return bare, corrected


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        main(Path(temporary))
