"""Lightning's Fabric, and LitGPT, which trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from loop import METHODS, adamw, assert_corrected, corrected
from packages import package
from sdsopt import SDSPreconditioner, find_pairs, link
from toy import assert_same

STEPS = 6


def gpt(rank: int = 2) -> nn.Module:
    """LitGPT's own, under grouped-query attention."""
    lora = package("litgpt.lora")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"n_layer": 1, "n_head": 4, "n_embd": 16, "n_query_groups": 2, "block_size": 16}
        where = {"lora_query": True, "lora_value": True, "lora_projection": True, "lora_mlp": True}
        model = lora.GPT(lora.Config(**shape, **where, lora_r=rank, lora_alpha=4, padded_vocab_size=32))
        lora.mark_only_lora_as_trainable(model)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():  # B
                nn.init.normal_(parameter, std=0.1)
    return model


def optimizer_of(model: nn.Module, method: str) -> Any:
    if method != "linked":
        return corrected(model, method)
    link(model)
    config = {"class_path": "sdsopt.SDSAdamW", "init_args": {"lr": 0.02, "weight_decay": 0.1}}
    return package("litgpt.utils").instantiate_torch_optimizer(config, model.parameters())


def loss_of(model: Any, step: int) -> torch.Tensor:
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(step))
    logits = model(tokens)
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(method: str, folder: Path, *, resume: bool = False, **options: Any) -> nn.Module:
    """As `litgpt finetune_lora` does it, with clipping."""
    fabric: Any = package("lightning.fabric").Fabric(accelerator="cpu", devices=1, **options)
    original = gpt()
    model = fabric.setup_module(original)
    optimizer = fabric.setup_optimizers(optimizer_of(model, method))
    assert isinstance(optimizer, SDSPreconditioner) == (method in {"sds", "sds-split", "linked"})
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    state = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    if resume:
        fabric.load(folder / "checkpoint", state)
    for step in range(state["step"], STEPS):
        fabric.backward(loss_of(model, step))
        fabric.clip_gradients(model, optimizer, max_norm=0.3)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["step"] = step + 1
        if step + 1 == STEPS // 2 and not resume:
            fabric.save(folder / "checkpoint", state)
    return original


def by_hand(method: str) -> nn.Module:
    model = gpt()
    optimizer = SDSPreconditioner(adamw(model.parameters()), model) if method == "linked" else corrected(model, method)
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        loss_of(model, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return model


@pytest.mark.filterwarnings("ignore:.*weights_only=False.*:FutureWarning")
@pytest.mark.parametrize("method", [*METHODS, "linked"])
def test_fabric_trains_as_the_loop_does_and_resumes(method: str, tmp_path: Path) -> None:
    whole = train(method, tmp_path)
    assert len(find_pairs(whole)) == 4
    assert_same(whole, by_hand(method))
    assert_same(whole, train(method, tmp_path, resume=True))
    assert_corrected(whole, by_hand("plain"))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision(method: str, tmp_path: Path) -> None:
    whole = train(method, tmp_path, precision="bf16-mixed")
    assert_same(whole, train(method, tmp_path, precision="bf16-mixed", resume=True))
    assert_corrected(whole, train("plain", tmp_path, precision="bf16-mixed"))
