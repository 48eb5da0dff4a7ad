"""Optimizers built from parameters alone."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import sdsopt
from sdsopt import SDSSGD, SDSAdamW, SDSPreconditioner, link, linked_pairs
from sdsopt.errors import NoPairsError, UnknownCorrectionError
from toy import Network, assert_same, train

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


def test_pairs_come_once_in_the_parameters_order() -> None:
    model = Network()
    first, second = link(model)
    assert linked_pairs([model.second.B, model.head.weight, model.first.A, model.second.A]) == [second, first]


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
    [pair, _] = link(other)
    assert pair.A is other.first.A
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


def test_kohya_style_loading_by_name() -> None:
    """sd-scripts takes `--optimizer_type sdsopt.SDSAdamW` apart and calls the class with parameters and options."""
    module, _, name = "sdsopt.SDSAdamW".rpartition(".")
    model = Network()
    link(model)
    optimizer = getattr(importlib.import_module(module), name)([*model.parameters()], lr=1e-3, weight_decay=0.0)
    assert isinstance(optimizer, Optimizer)
    assert isinstance(optimizer, sdsopt.SDSPreconditioner)
    assert len(optimizer.pairs) == 2
