"""Hugging Face's Trainer and Accelerate, end to end: train, checkpoint, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from sdsopt import SDSPreconditioner
from tiny_models import MODELS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def build(correction: str | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = MODELS["llama"]()
    optimizer: torch.optim.Optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    return model, optimizer if correction is None else SDSPreconditioner(optimizer, model, correction)


def trained(folder: Path, correction: str | None, resume: str | None = None) -> dict[str, torch.Tensor]:
    model, optimizer = build(correction)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=Tokens(), optimizers=(optimizer, None))  # pyright: ignore
    trainer.train(resume_from_checkpoint=resume)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_trainer_resumes_bit_for_bit_and_the_correction_acts(correction: str, tmp_path: Path) -> None:
    whole = trained(tmp_path, correction)
    resumed = trained(tmp_path, correction, resume=str(tmp_path / "checkpoint-3"))
    bare = trained(tmp_path / "bare", None)
    assert whole.keys() == bare.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not any(torch.equal(whole[name], bare[name]) for name in whole)


def test_accelerate_prepares_the_wrapper() -> None:
    results: list[dict[str, Any]] = []
    for prepared in (False, True):
        model, optimizer = build("sds")
        scheduler: Any = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
        accelerator = Accelerator(cpu=True)
        if prepared:
            model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(**{key: value[None] for key, value in Tokens()[step].items()}).loss
            accelerator.backward(loss) if prepared else loss.backward()
            optimizer.step()
            scheduler.step()
        results.append(accelerator.unwrap_model(model).state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
