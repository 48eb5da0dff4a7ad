"""Real architectures with PEFT: one step corrects every pair, as the formula says, and changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

import oracle
from recorder import corrected_gradients
from sdsopt import SDSPreconditioner, find_pairs
from tiny_models import MODELS

EXPONENTS = {"sds": 0.5, "sds-split": 0.5, "scaled": 1.0}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("correction", EXPONENTS)
def test_gradients_match_the_oracle(name: str, correction: str) -> None:
    model, batch = MODELS[name]()
    model(**batch).loss.backward()
    seen = corrected_gradients(model, correction)
    pairs = find_pairs(model)
    assert pairs
    for pair in pairs:
        expected_A, expected_B = oracle.corrected_pair(pair, EXPONENTS[correction], damping=1e-6)
        assert oracle.relative_error(pair.split_A(seen[pair.A]), expected_A) < 1e-6, pair.name
        assert oracle.relative_error(pair.split_B(seen[pair.B]), expected_B) < 1e-6, pair.name

    factors = {factor for pair in pairs for factor in (pair.A, pair.B)}
    for parameter, gradient in seen.items():
        assert (parameter in factors) or torch.equal(gradient, parameter.grad)  # pyright: ignore


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("correction", EXPONENTS)
def test_a_step_changes_exactly_the_pairs(name: str, correction: str) -> None:
    model, batch = MODELS[name]()
    before = copy.deepcopy(model.state_dict())
    factors = {id(factor) for pair in find_pairs(model) for factor in (pair.A, pair.B)}
    trainable = [p for p in model.parameters() if id(p) in factors]
    optimizer = SDSPreconditioner(torch.optim.AdamW(trainable, lr=1e-3), model, correction)
    model(**batch).loss.backward()
    optimizer.step()

    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    names = {key for key, p in model.named_parameters() if id(p) in factors}
    assert changed == names
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "whisper"])
def test_training_lowers_the_loss(name: str) -> None:
    model, batch = MODELS[name]()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SDSPreconditioner(torch.optim.AdamW(parameters, lr=1e-2), model)
    losses: list[float] = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
