"""Optimizers built from parameters alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from sdsopt import SDSSGD, SDSAdamW, SDSPreconditioner, attach, find_pairs, link, linked_pairs
from sdsopt.errors import DoubleCorrectionError, NoPairsError, UnknownCorrectionError
from toy import LoRALinear, Network, assert_same, train

Build = Callable[[Any], Optimizer]
PAIRED: list[tuple[Build, Build]] = [
    (
        lambda p: SDSAdamW(p, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, correction="sds-split"),
        lambda p: AdamW(p, lr=0.02, betas=(0.8, 0.9), weight_decay=0.1),
    ),
    (
        lambda p: SDSSGD(p, 0.1, 0.9, weight_decay=0.1, nesterov=True, correction="sds-split"),
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
]
paired = pytest.mark.parametrize(("build", "inner"), PAIRED, ids=["AdamW", "SGD"])


def groups(model: Network) -> list[dict[str, Any]]:
    return [{"params": list(model.first.parameters())}, {"params": [model.second.B, *model.head.parameters()]}]


@paired
@pytest.mark.parametrize(
    "parameters",
    [lambda m: m.parameters(), lambda m: m.named_parameters(), groups],
    ids=["parameters", "named", "groups"],
)
def test_linked_parameters_are_enough(parameters: Callable[[Network], Any], build: Build, inner: Build) -> None:
    linked, wrapped = Network(), Network()
    assert len(link(linked)) == 2
    optimizer = build(parameters(linked))
    train(linked, optimizer)
    train(wrapped, SDSPreconditioner(inner(parameters(wrapped)), wrapped, "sds-split"))
    assert_same(linked, wrapped)


def test_any_other_optimizer_takes_linked_pairs() -> None:
    linked, wrapped = Network(), Network()
    link(linked)
    inner = torch.optim.RMSprop(linked.parameters(), lr=0.01)
    train(linked, SDSPreconditioner(inner, linked_pairs(linked.parameters())))
    train(wrapped, SDSPreconditioner(torch.optim.RMSprop(wrapped.parameters(), lr=0.01), wrapped))
    assert_same(linked, wrapped)


def names(parameters: Any) -> list[str]:
    return [pair.name for pair in linked_pairs(parameters)]


def test_one_parameter_leads_to_all_pairs_of_its_model() -> None:
    """As SDSPreconditioner knows them from the model: groups may be added later."""
    model, other = Network(), Network(seed=1)
    assert [pair.name for pair in link(model)] == ["first[default]", "second[default]"]
    link(other.second)
    assert names([model.head.weight, model.second.B]) == ["first[default]", "second[default]"]
    assert names([other.second.A, model.first.A]) == ["[default]", "first[default]", "second[default]"]
    link(model.first)
    assert len(names(model.parameters())) == 2  # each once


def test_adapters_that_change_after_linking_are_seen() -> None:
    model, reference = Network(), Network()
    link(model)
    model.first.A = model.first.A.detach()  # a new Parameter, as `load_state_dict(assign=True)` makes it
    model.head = LoRALinear(torch.eye(2, 9), torch.eye(3, 2))  # pyright: ignore
    reference.head = LoRALinear(torch.eye(2, 9), torch.eye(3, 2))  # pyright: ignore
    optimizer = SDSAdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    assert [pair.name for pair in optimizer.pairs] == ["first[default]", "second[default]", "head[default]"]
    train(model, optimizer)
    train(reference, SDSPreconditioner(AdamW(reference.parameters(), lr=0.02, weight_decay=0.0), reference))
    assert_same(model, reference)


def test_pairs_may_be_linked_by_hand_and_count_once() -> None:
    model, reference = Network(), Network()
    first, _ = find_pairs(model)
    assert link([first, first]) == [first]
    optimizer = SDSSGD(model.parameters(), lr=0.1, correction="sds-split")
    assert optimizer.pairs == (first,)
    train(model, optimizer)
    inner = SGD(reference.parameters(), lr=0.1)
    train(reference, SDSPreconditioner(inner, find_pairs(reference)[:1], "sds-split"))
    assert_same(model, reference)


def test_linking_and_attaching_correct_once() -> None:
    """Both may be called on a model; the second correction is refused, whichever comes second."""
    model = Network()
    link(model)
    with attach(model):
        link(model)
        with pytest.raises(DoubleCorrectionError, match="second time"):
            SDSAdamW(model.parameters())
        train(model, AdamW(model.parameters()))
    optimizer = SDSAdamW(model.parameters())
    train(model, optimizer)
    attach(model)
    before = copy.deepcopy(model)
    with pytest.raises(DoubleCorrectionError, match="Use one of the two"):
        train(model, optimizer)
    assert_same(model, before)


def test_saved_parameters_pass_weights_only_loading_and_carry_no_link() -> None:
    model = Network()
    link(model)
    attach(model)
    file = io.BytesIO()
    torch.save(list(model.parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert torch.equal(loaded[0], model.first.A)
    with pytest.raises(NoPairsError, match="none of the 6 parameters"):
        linked_pairs(loaded)


def test_a_linked_model_is_freed() -> None:
    model = Network()
    link(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@paired
def test_without_a_link_it_says_what_to_call(build: Build, inner: Build) -> None:
    model = Network()
    with pytest.raises(NoPairsError, match=r"none of the 6 parameters is linked.*sdsopt.link\(model\)"):
        build(model.parameters())


def test_linking_a_model_without_adapters() -> None:
    with pytest.raises(NoPairsError, match="found no LoRA pair"):
        link(nn.Linear(2, 2))


def test_wrong_options_are_refused_as_ever() -> None:
    model = Network()
    link(model)
    with pytest.raises(UnknownCorrectionError):
        SDSAdamW(model.parameters(), correction="nothing")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_not_linked_to_the_original(copied: Callable[[Network], Network]) -> None:
    model = Network()
    link(model)
    other = copied(model)
    assert_same(model, other)
    with pytest.raises(NoPairsError):
        linked_pairs(other.parameters())
    link(other)
    assert linked_pairs(other.parameters())[0].A is other.first.A
    assert linked_pairs(model.parameters())[0].A is model.first.A


@paired
def test_copies_of_the_optimizer_train_on(build: Build, inner: Build) -> None:
    model = Network()
    link(model)
    optimizer = build(model.parameters())
    train(model, optimizer)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    assert type(other_optimizer) is type(optimizer)
    train(model, optimizer, first=3)
    train(other, other_optimizer, first=3)
    assert_same(model, other)


@paired
def test_state_dicts_are_the_bare_optimizers(build: Build, inner: Build) -> None:
    model = Network()
    link(model)
    optimizer = build(model.parameters())
    train(model, optimizer)
    bare = inner(model.parameters())
    bare.load_state_dict(optimizer.state_dict())
    build(model.parameters()).load_state_dict(bare.state_dict())
    assert bare.state_dict().keys() == optimizer.state_dict().keys()
