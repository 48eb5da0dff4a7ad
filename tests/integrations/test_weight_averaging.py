"""Averages of weights (SWA, EMA): copies that follow the model and are never corrected themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from loop import METHODS, Loop, assert_corrected, assert_resumes, corrected
from sdsopt import SDSPreconditioner, attach, find_pairs, link, linked_pairs
from sdsopt.errors import NoPairsError
from toy import Network, assert_same

methods = pytest.mark.parametrize("method", METHODS)
DECAY = 0.8


class Normed(Network):
    """With running statistics, which an average of weights must measure anew."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(self.norm(self.first(x)))))


@dataclass
class Averaging(Loop):
    """A loop that averages after every step."""

    averaged: Any = None

    def step(self) -> None:
        super().step()
        self.averaged.update_parameters(self.network)

    @property
    def _parts(self) -> list[Any]:
        return [*super()._parts, self.averaged]


def averaging(method: str, multi_avg_fn: Any, network: Callable[[], Network] = Network) -> Averaging:
    model = network()
    link(model)
    optimizer = corrected(model, method)
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    return Averaging(model, optimizer, SWALR(optimizer, swa_lr=0.005, anneal_epochs=4), averaged=averaged)


def ema(method: str) -> Averaging:
    return averaging(method, get_ema_multi_avg_fn(DECAY))


@methods
def test_ema_follows_the_corrected_weights_and_resumes(method: str) -> None:
    run = ema(method)
    expected = None
    for batch in range(6):
        run.run(batch, batch + 1)
        weights = [p.detach().clone() for p in run.network.parameters()]
        old = weights if expected is None else expected
        expected = [DECAY * average + (1 - DECAY) * weight for average, weight in zip(old, weights, strict=True)]
    assert expected is not None
    for average, value in zip(run.averaged.parameters(), expected, strict=True):
        torch.testing.assert_close(average, value)
    assert_corrected(run.averaged, ema("plain").run(0, 6).averaged)

    resumed = ema(method).load(ema(method).run(0, 3).save()).run(3, 6)
    assert_same(resumed.averaged, run.averaged)


@methods
def test_swa_with_its_schedule_and_batch_norm(method: str) -> None:
    def swa(method: str) -> Averaging:
        return averaging(method, get_swa_multi_avg_fn(), Normed)

    whole = assert_resumes(lambda: swa(method))
    assert isinstance(whole, Averaging)
    assert whole.optimizer.param_groups[0]["lr"] == 0.005
    assert_corrected(whole.averaged, swa("plain").run(0, 8).averaged)

    x = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    update_bn(x.split(16), whole.averaged)
    hidden = whole.averaged.module.first(x).detach()
    expected = torch.stack([batch.var(0) for batch in hidden.split(16)]).mean(0)
    torch.testing.assert_close(whole.averaged.module.norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(whole.averaged.module.norm.running_var, expected)


@methods
def test_the_average_disturbs_nothing(method: str) -> None:
    run = ema(method).run(0, 6)
    network = Network()
    optimizer = corrected(network, method)
    assert_same(
        Loop(network, optimizer, SWALR(optimizer, swa_lr=0.005, anneal_epochs=4)).run(0, 6).network, run.network
    )


@pytest.mark.parametrize("copied", [AveragedModel, copy.deepcopy])
@methods
def test_a_copy_is_another_model(method: str, copied: Callable[[nn.Module], Any]) -> None:
    """Neither links nor hooks reach it: gradients through it are raw, and its parameters lead to no pair."""
    network, raw = Network(), Network()
    link(network)
    optimizer = corrected(network, method)
    other = copied(network)
    with pytest.raises(NoPairsError, match="none of the 6 parameters is linked"):
        linked_pairs(other.parameters())

    twin = getattr(other, "module", other)
    for model in (network, twin, raw):
        model.loss().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (twin, raw)]
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))  # pyright: ignore
    assert (not torch.equal(network.first.A.grad, raw.first.A.grad)) == (method == "hooks")  # pyright: ignore

    before = copy.deepcopy(twin)
    optimizer.step()
    assert_same(twin, before)


@pytest.mark.parametrize("method", ["sds", "hooks"])
def test_a_copy_can_be_corrected_on_its_own(method: str) -> None:
    network, alone = Network(), Network()
    corrected(network, method)
    other = copy.deepcopy(network)
    for model in (other, alone):
        Loop(model, corrected(model, method)).run(0, 4)
    assert_same(other, alone)
    assert_same(network, Network())
    plain = Network()
    Loop(plain, corrected(plain, "plain")).run(0, 4)
    assert_corrected(other, plain)


def test_the_average_holds_pairs_of_its_own() -> None:
    network = Network()
    averaged = AveragedModel(network)
    handle = attach(network)
    pairs = find_pairs(averaged)
    assert [pair.name for pair in pairs] == ["module.first[default]", "module.second[default]"]
    optimizer = SDSPreconditioner(torch.optim.SGD(averaged.parameters(), lr=0.1), averaged)
    assert handle.num_factors == 4
    assert optimizer.pairs[0].A is averaged.module.first.A
