"""On real architectures, every trainable LoRA parameter belongs to exactly one pair."""

from __future__ import annotations

import pytest
import torch

from sdsopt.pairs import find_pairs

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tiny_models import MODELS, RANK


def test_there_are_ten_models() -> None:
    assert len(MODELS) == 10


@pytest.mark.parametrize("name", MODELS)
def test_every_lora_parameter_is_in_one_pair(name: str) -> None:
    model, _ = MODELS[name]()
    pairs = find_pairs(model)
    expected = {key for key, parameter in model.named_parameters() if "lora_" in key and parameter.requires_grad}
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    found = [names[id(factor)] for pair in pairs for factor in (pair.A, pair.B)]

    assert expected and set(found) == expected
    assert len(found) == len(set(found))
    assert not pairs.skipped


@pytest.mark.parametrize("name", MODELS)
def test_pairs_can_be_multiplied(name: str) -> None:
    model, _ = MODELS[name]()
    for pair in find_pairs(model):
        pair.check()
        assert pair.rank == RANK
        assert model.get_submodule(pair.name.removesuffix("[default]")) is pair.module


@pytest.mark.parametrize("name", MODELS)
def test_batches_give_every_factor_a_gradient(name: str) -> None:
    """What the optimizer's tests rely on."""
    model, batch = MODELS[name]()
    model(**batch).loss.backward()
    for pair in find_pairs(model):
        for factor in (pair.A, pair.B):
            assert factor.grad is not None and torch.isfinite(factor.grad).all() and factor.grad.any(), pair.name


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_models_are_seeded(name: str) -> None:
    (first, batch), (second, _) = MODELS[name](), MODELS[name]()
    assert torch.equal(first(**batch).loss, second(**batch).loss)


def test_both_expert_weights_of_a_moe_are_found() -> None:
    model, _ = MODELS["qwen3_moe"]()
    stacked = [pair for pair in find_pairs(model) if pair.num_blocks > 1]
    assert [pair.num_blocks for pair in stacked] == [4] * 4  # two layers, two nested wrappers each
    assert {pair.module.parameter_name for pair in stacked} == {"gate_up_proj", "down_proj"}
