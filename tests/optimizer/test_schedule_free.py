"""Schedule-free optimizers: the switch between training and averaged weights works through the wrapper."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import Optimizer

from recorder import train_by_hand
from sdsopt import SDSPreconditioner
from toy import Network, assert_same, train

schedulefree = pytest.importorskip("schedulefree", exc_type=ImportError)

NAMES = ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"]


def bare(name: str, model: Network) -> Optimizer:
    return getattr(schedulefree, name)(model.parameters(), lr=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_averaged_weights_are_those_of_the_bare_optimizer_on_corrected_gradients(name: str) -> None:
    model, by_hand, plain = Network(), Network(), Network()
    optimizer, inner, raw = SDSPreconditioner(bare(name, model), model), bare(name, by_hand), bare(name, plain)
    for each in (optimizer, inner, raw):
        each.train()  # pyright: ignore
    train(model, optimizer, 12)
    train(plain, raw, 12)
    train_by_hand(by_hand, inner, 12)
    training = copy.deepcopy(model)
    for each in (optimizer, inner, raw):
        each.eval()  # pyright: ignore
    assert_same(model, by_hand)
    assert not torch.equal(model.first.A, plain.first.A)
    assert not torch.equal(model.first.A, training.first.A)
    optimizer.train()
    torch.testing.assert_close(model.state_dict(), training.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_averaged_weights_raises_and_changes_nothing(name: str) -> None:
    model = Network()
    optimizer = SDSPreconditioner(bare(name, model), model)
    model.loss().backward()
    before, gradient = copy.deepcopy(model), model.first.A.grad
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step()
    assert_same(model, before)
    assert model.first.A.grad is gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_checkpoint_keeps_the_mode(name: str, mode: str) -> None:
    """It may be written while the averaged weights are in the model, as trainers do after an evaluation."""
    model, resumed = Network(), Network()
    optimizer = SDSPreconditioner(bare(name, model), model)
    optimizer.train()
    train(model, optimizer, 4)
    getattr(optimizer, mode)()
    resumed.load_state_dict(model.state_dict())
    again = SDSPreconditioner(bare(name, resumed), resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, each in ((model, optimizer), (resumed, again)):
        each.train()
        train(net, each, 3, first=4)
    assert_same(model, resumed)
