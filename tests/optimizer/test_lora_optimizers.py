"""PEFT's own optimizers for LoRA: LoRA+ works inside, those that correct gradients themselves are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft.optimizers
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from recorder import correct_by_hand, corrected_gradients
from sdsopt import SDSPreconditioner, find_pairs
from sdsopt.errors import UnsupportedOptimizerError
from tiny_models import MODELS

RATIO = 16.0


def bitsandbytes_adamw() -> Any:
    return pytest.importorskip("bitsandbytes.optim", exc_type=ImportError).AdamW8bit


INNER: dict[str, Callable[[], Any]] = {
    "SGD": lambda: SGD,
    "AdamW": lambda: AdamW,
    "bitsandbytes.AdamW8bit": bitsandbytes_adamw,
}


def loraplus(model: Any, inner: str) -> Optimizer:
    decay = {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3}
    cls = INNER[inner]()
    return peft.optimizers.create_loraplus_optimizer(model, cls, lr=1e-3, loraplus_lr_ratio=RATIO, **decay)


def train(model: nn.Module, batch: Any, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("model_name", ["llama", "gemma", "bert"])
def test_loraplus_steps_on_corrected_gradients(model_name: str, inner: str) -> None:
    """Its groups tear the pairs apart, and embeddings go to a third: all are corrected, at their groups' rates."""
    (model, batch), (by_hand, _), (plain, _) = (MODELS[model_name]() for _ in range(3))
    train(model, batch, SDSPreconditioner(loraplus(model, inner), model))
    train(plain, batch, loraplus(plain, inner))
    optimizer = loraplus(by_hand, inner)
    for _ in range(3):
        by_hand.zero_grad()
        by_hand(**batch).loss.backward()
        correct_by_hand(by_hand)
        optimizer.step()
    assert_same(model, by_hand)
    for pair, raw in zip(find_pairs(model), find_pairs(plain), strict=True):
        assert not torch.equal(pair.A, raw.A), pair.name
        assert not torch.equal(pair.B, raw.B), pair.name


def test_each_factor_moves_at_the_rate_of_its_group() -> None:
    model, batch = MODELS["llama"]()
    optimizer = SDSPreconditioner(loraplus(model, "SGD"), model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    model(**batch).loss.backward()
    pairs = find_pairs(model)
    seen = corrected_gradients(model, "sds")
    before = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
    optimizer.step()
    for pair, (A, B) in zip(pairs, before, strict=True):
        torch.testing.assert_close(pair.A, A - 1e-3 * seen[pair.A])
        torch.testing.assert_close(pair.B, B - RATIO * 1e-3 * seen[pair.B])


@pytest.mark.parametrize("inner", ["AdamW", "bitsandbytes.AdamW8bit"])
def test_the_split_form_takes_the_decay_of_each_group(inner: str) -> None:
    """A step without gradient is decay alone, and B's groups decay at `RATIO` times the rate of A's."""
    model, _ = MODELS["llama"]()
    optimizer = SDSPreconditioner(loraplus(model, inner), model, "sds-split")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    start = copy.deepcopy(model)
    optimizer.step()
    for pair, old in zip(find_pairs(model), find_pairs(start), strict=True):
        torch.testing.assert_close(pair.A, old.A * (1 - 1e-3 * 0.1), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(pair.B, old.B * (1 - RATIO * 1e-3 * 0.1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inner", INNER)
def test_loraplus_checkpoints_move_both_ways(inner: str) -> None:
    start, batch = MODELS["llama"]()
    optimizer = SDSPreconditioner(loraplus(start, inner), start)
    train(start, batch, optimizer)
    ends = copy.deepcopy(start), copy.deepcopy(start)
    others = loraplus(ends[0], inner), SDSPreconditioner(loraplus(ends[1], inner), ends[1], "lora")
    for model, other in zip(ends, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, batch, other)
    assert_same(*ends)


def lorafa(model: Any) -> Optimizer:
    return peft.optimizers.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)


def riemannian(model: Any) -> Optimizer:
    return peft.optimizers.create_riemannian_optimizer(model, AdamW, lr=1e-3)


@pytest.mark.parametrize("create", [lorafa, riemannian])
@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_what_corrects_gradients_itself_is_refused(create: Callable[[Any], Optimizer], correction: str) -> None:
    model, _ = MODELS["llama"]()
    with pytest.raises(UnsupportedOptimizerError, match="corrects LoRA gradients itself"):
        SDSPreconditioner(create(model), model, correction)


def test_lora_fa_without_its_optimizer_is_corrected() -> None:
    """The way out: A frozen as LoRA-FA has it, and a plain optimizer inside."""
    model, batch = MODELS["llama"]()
    lorafa(model)  # freezes A
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SDSPreconditioner(SGD(trainable, lr=0.1), model)
    start = copy.deepcopy(model)
    model(**batch).loss.backward()
    seen = corrected_gradients(model, "sds")
    optimizer.step()
    for pair, old in zip(find_pairs(model), find_pairs(start), strict=True):
        assert torch.equal(pair.A, old.A)
        torch.testing.assert_close(pair.B, old.B - 0.1 * seen[pair.B])
        assert not torch.allclose(seen[pair.B], pair.B.grad)  # pyright: ignore
