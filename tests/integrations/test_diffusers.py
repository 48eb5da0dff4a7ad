"""The steps of diffusers' LoRA scripts, on a tiny UNet and text encoder, with the lines of the documentation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.optim import AdamW

import tiny_models
from documented import blocks, execute
from hf_runs import Weights, all_differ, fresh_accelerator, same, trainable, weights

pytest.importorskip("diffusers", exc_type=ImportError)
training_utils = pytest.importorskip("diffusers.training_utils", exc_type=ImportError)

PAGE = "docs/use-with/huggingface.md"
UNET_ALONE, BOTH = blocks(PAGE, "## diffusers")


def trained(wrap: str, *, prepared: bool = True) -> tuple[Weights, Weights]:
    """The order is that of `train_dreambooth_lora.py` in bf16.

    Args:
        wrap: The code that wraps `optimizer`; none is the bare script.
        prepared: Whether Accelerate trains, or a loop of the same steps by hand.
    """
    unet, text_encoder = tiny_models.unet(), tiny_models.text_encoder()
    for model in (unet, text_encoder):
        model.to(torch.bfloat16)
        training_utils.cast_training_params(model, dtype=torch.float32)
    optimizer: Any = AdamW([*trainable(unet), *trainable(text_encoder)], lr=1e-2)
    optimizer = execute(wrap, PAGE, optimizer=optimizer, unet=unet, text_encoder=text_encoder)["optimizer"]
    schedule: Any = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    parameters = [*trainable(unet), *trainable(text_encoder)]
    accelerator = fresh_accelerator("bf16")
    if prepared:
        unet, text_encoder, optimizer, schedule = accelerator.prepare(unet, text_encoder, optimizer, schedule)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        noise, images = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
        tokens = torch.randint(0, 60, (2, 5), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=not prepared):
            states = text_encoder(tokens).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16, enabled=not prepared):
            # Prepared models return float32, so the text's states come to the UNet as such.
            predicted = unet(images + noise, torch.tensor([step, 5]), states.float()).sample
        loss = mse_loss(predicted.float(), noise)
        accelerator.backward(loss) if prepared else loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return weights(accelerator.unwrap_model(unet)), weights(accelerator.unwrap_model(text_encoder))


def test_the_unet_alone() -> None:
    unet, text_encoder = trained(UNET_ALONE)
    bare_unet, _ = trained("")
    assert all_differ(unet, bare_unet)
    by_hand = trained(UNET_ALONE, prepared=False)
    assert same(unet, by_hand[0])
    assert same(text_encoder, by_hand[1])


def test_the_text_encoder_too() -> None:
    unet, text_encoder = trained(BOTH)
    _, uncorrected = trained(UNET_ALONE)
    bare_unet, bare_text_encoder = trained("")
    assert all_differ(unet, bare_unet)
    assert all_differ(text_encoder, bare_text_encoder)
    assert all_differ(text_encoder, uncorrected)
    by_hand = trained(BOTH, prepared=False)
    assert same(unet, by_hand[0])
    assert same(text_encoder, by_hand[1])
