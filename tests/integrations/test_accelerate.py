"""A loop with Accelerate: prepare, accumulate, clip, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.optim import AdamW

import sdsopt
from hf_runs import (
    AUTOCAST,
    RATE,
    STEPS,
    Tokens,
    Weights,
    adapted,
    all_differ,
    by_hand,
    fresh_accelerator,
    reset_accelerate,
    same,
    trainable,
    weights,
)
from sdsopt import SDSPreconditioner
from sdsopt.errors import UnsupportedOptimizerError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def accelerated(
    place: str, folder: Path, precision: str = "fp32", *, max_grad_norm: float = 0.1, first: int = 0
) -> Weights:
    """Trains from the step `first` on, with a checkpoint in the middle."""
    accelerator = fresh_accelerator(precision, accumulation=2)
    model = adapted()
    optimizer: torch.optim.Optimizer = AdamW(trainable(model), lr=RATE, weight_decay=0.0)
    if place == "optimizer":
        optimizer = SDSPreconditioner(optimizer, model)
    schedule: Any = transformers.get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    loader: Any = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    if place == "backward":
        sdsopt.attach(model)
    if first:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, 2 * first)
    for step, batch in enumerate(loader, 2 * first):
        if step == 2 * STEPS:
            break
        with accelerator.accumulate(model):
            loss = model(**batch, num_items_in_batch=torch.tensor(14)).loss  # the mean
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not first and step + 1 == STEPS:
            accelerator.save_state(str(folder))
    return weights(accelerator.unwrap_model(model))


@pytest.mark.parametrize("precision", AUTOCAST)
@pytest.mark.parametrize("place", ["optimizer", "backward"])
def test_it_equals_the_loop_by_hand_and_resumes(place: str, precision: str, tmp_path: Path) -> None:
    whole = accelerated(place, tmp_path, precision)
    assert same(whole, by_hand(place, precision=precision))
    assert all_differ(whole, by_hand("nowhere", precision=precision))
    assert same(whole, accelerated(place, tmp_path, precision, first=STEPS // 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate sets up fp16 and its scaler on a GPU only")
def test_fp16_on_a_gpu() -> None:
    reset_accelerate()
    accelerator = Accelerator(mixed_precision="fp16")
    model = adapted()
    before = weights(model)
    model, optimizer = accelerator.prepare(model, SDSPreconditioner(AdamW(trainable(model), lr=RATE), model))
    tokens = Tokens()[0]["input_ids"][None].to(accelerator.device)
    taken = 0
    for _ in range(30):  # the first steps overflow
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        taken += not optimizer.step_was_skipped
        optimizer.zero_grad()
    assert taken
    assert all_differ(before, {name: w.cpu() for name, w in weights(accelerator.unwrap_model(model)).items()})


def test_wrapping_after_prepare_trains_the_same() -> None:
    """Not the documented order, but none that fails silently."""
    results: list[Weights] = []
    for after in (False, True):
        accelerator = fresh_accelerator("fp32")
        model: Any = adapted()
        optimizer: Any = AdamW(trainable(model), lr=RATE)
        if not after:
            optimizer = SDSPreconditioner(optimizer, model)
        model, optimizer = accelerator.prepare(model, optimizer)
        if after:
            optimizer = SDSPreconditioner(optimizer, model)
        for step in range(3):
            tokens = Tokens()[step]["input_ids"][None]
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            optimizer.zero_grad()
        results.append(weights(accelerator.unwrap_model(model)))
    assert same(*results)


def test_wrapping_what_is_wrapped_inside_is_refused() -> None:
    """It would correct twice."""
    model = adapted()
    prepared: Any = fresh_accelerator("fp32").prepare(SDSPreconditioner(AdamW(trainable(model)), model))
    with pytest.raises(UnsupportedOptimizerError, match=r"SDSPreconditioner .*already"):
        SDSPreconditioner(prepared, model)
