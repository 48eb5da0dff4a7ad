"""Adapters that are added to a model after its optimizer was wrapped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import SGD

from sdsopt import SDSSGD, SDSPreconditioner, attach, find_pairs, link
from sdsopt.errors import DoubleCorrectionError, PairShapeError, UnsupportedCorrectionError
from tiny_models import MODELS
from toy import LoRALinear, Network, assert_same, train

Build = Callable[[Any], SDSPreconditioner]


def by_model(model: Any) -> SDSPreconditioner:
    return SDSPreconditioner(SGD(factors(model), lr=0.1), model)


def by_link(model: Any) -> SDSPreconditioner:
    link(model)
    return SDSSGD(factors(model), lr=0.1)


def factors(model: nn.Module) -> list[Parameter]:
    return [parameter for pair in find_pairs(model) for parameter in (pair.A, pair.B) if parameter.requires_grad]


def grow(model: Network) -> list[Parameter]:
    """Puts a third LoRA layer where the head was."""
    model.head = LoRALinear(torch.eye(2, 9), torch.ones(3, 2))  # pyright: ignore
    return list(model.head.parameters())


AS_GIVEN: dict[str, Callable[[list[Parameter]], Any]] = {
    "list": list,
    "generator": iter,
    "named": lambda parameters: [(str(i), parameter) for i, parameter in enumerate(parameters)],
}


@pytest.mark.parametrize("given", AS_GIVEN)
@pytest.mark.parametrize("build", [by_model, by_link])
def test_an_adapter_added_later_is_corrected_like_the_others(build: Build, given: str) -> None:
    model, reference, raw = Network(), Network(), Network()
    if given == "named":
        parameters: Any = [(name, p) for name, p in model.named_parameters() if not name.startswith("head")]
        link(model)
        optimizer = SDSSGD(parameters, lr=0.1)
    else:
        optimizer = build(model)
    train(model, optimizer, steps=1)
    for other in (reference, raw):
        other.load_state_dict(model.state_dict())
    optimizer.add_param_group({"params": AS_GIVEN[given](grow(model))})
    assert [pair.name for pair in optimizer.pairs] == ["first[default]", "second[default]", "head[default]"]
    train(model, optimizer, first=1)

    grow(reference)
    train(reference, by_model(reference), first=1)
    assert_same(model, reference)
    grow(raw)
    only_old = [pair for pair in find_pairs(raw) if not pair.name.startswith("head")]
    train(raw, SDSPreconditioner(SGD(raw.parameters(), lr=0.1), only_old), first=1)
    assert not torch.equal(model.head.A, raw.head.A)  # pyright: ignore


@pytest.mark.parametrize("build", [by_model, by_link])
def test_a_second_peft_adapter(build: Build) -> None:
    model, batch = MODELS["llama"]()
    optimizer = build(model)
    known = len(optimizer.pairs)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("second")
    optimizer.add_param_group({"params": factors(model)})
    assert [pair.adapter for pair in optimizer.pairs[known:]] == ["second", "second"]

    model(**batch).loss.backward()
    [pair, _] = optimizer.pairs[known:]
    before = pair.A.detach().clone()
    reference = copy.deepcopy(model)
    gradients = [parameter.grad for parameter in factors(model)]
    for parameter, gradient in zip(factors(reference), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    by_model(reference).step()
    assert_same(model, reference)
    assert not torch.equal(pair.A, before - 0.1 * pair.A.grad)  # pyright: ignore  # no raw step


def test_adapters_that_were_there_stay_the_ones_that_are_known() -> None:
    model, _ = MODELS["llama"]()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    pairs = optimizer.pairs
    optimizer.add_param_group({"params": Parameter(torch.ones(2))})
    assert optimizer.pairs == pairs


def test_a_group_of_another_linked_model() -> None:
    model, other = Network(), Network(seed=1)
    optimizer = by_link(model)
    link(other)
    optimizer.add_param_group({"params": list(other.parameters())})
    assert [pair.A is not None for pair in optimizer.pairs] == [True] * 4
    assert optimizer.pairs[2].A is other.first.A


def test_pairs_given_by_hand_stay_the_only_ones() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.first.parameters(), lr=0.1), find_pairs(model)[:1])
    link(model)
    optimizer.add_param_group({"params": list(model.second.parameters())})
    assert [pair.name for pair in optimizer.pairs] == ["first[default]"]


@pytest.mark.parametrize("build", [by_model, by_link])
def test_copies_keep_the_pairs_that_they_have(build: Build) -> None:
    model = Network()
    _, optimizer = copied = copy.deepcopy((model, build(model)))
    optimizer.add_param_group({"params": grow(copied[0])})
    assert len(optimizer.pairs) == 2
    train(*copied)


def test_a_model_is_not_kept_alive() -> None:
    model = Network()
    layer = model.first
    optimizer = by_model(model)
    del model
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert len(optimizer.pairs) == 2 and optimizer.pairs[0].module is layer


def unfit(model: Network) -> None:
    model.head.lora_B["default"].weight = Parameter(torch.ones(3, 4))  # pyright: ignore


def hooked(model: Network) -> None:
    attach([pair for pair in find_pairs(model) if pair.name.startswith("head")])


def halved(model: Network) -> None:
    model.head.bfloat16()


@pytest.mark.parametrize(
    ("spoil", "error"),
    [(unfit, PairShapeError), (hooked, DoubleCorrectionError), (halved, UnsupportedCorrectionError)],
)
def test_a_group_is_checked_as_at_construction(spoil: Callable[[Network], None], error: type[Exception]) -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(factors(model), lr=0.1, momentum=0.9), model, rebalance_every=2)
    grow(model)
    spoil(model)
    with pytest.raises(error):
        optimizer.add_param_group({"params": list(model.head.parameters())})
    assert len(optimizer.param_groups) == 1 and len(optimizer.pairs) == 2


def test_what_the_inner_optimizer_refuses_changes_nothing() -> None:
    model = Network()
    optimizer = by_model(model)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [*grow(model), model.first.A]})
    assert len(optimizer.param_groups) == 1 and len(optimizer.pairs) == 2


def test_an_optimizer_of_frozen_adapters_alone() -> None:
    """As `PeftModel.from_pretrained` loads them."""
    model = Network()
    for layer in (model.first, model.second):
        layer.requires_grad_(False)
    with pytest.raises(ValueError, match=r"all 2 LoRA pairs .* frozen \(the first is first\[def.*is_trainable=True"):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    model.second.B.requires_grad_(True)
    assert len(SDSPreconditioner(SGD(model.parameters(), lr=0.1), model).pairs) == 2


def test_an_adapter_may_be_frozen_after_wrapping_and_wake_up() -> None:
    model, reference = Network(), Network()
    optimizer = by_model(model)
    layers = nn.ModuleList([model.first, model.second])
    layers.requires_grad_(False)
    train(model, optimizer)
    assert_same(model, reference)
    layers.requires_grad_(True)
    train(model, optimizer)
    train(reference, by_model(reference))
    assert_same(model, reference)


def test_repr_says_how_many_pairs_are_corrected() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD([model.first.B], lr=0.1), model)
    assert ", 1 of 2 LoRA pairs)" in repr(optimizer)
    model.second.requires_grad_(False)
    assert ", 1 LoRA pair)" in repr(optimizer)
    model.second.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.second.parameters())})
    assert ", 2 LoRA pairs)" in repr(optimizer)
    del model.first.lora_A["default"]
    assert ", 1 LoRA pair)" in repr(optimizer)
