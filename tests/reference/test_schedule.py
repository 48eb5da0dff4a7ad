"""Warm-up, split and refreshes over a run, and a run that is resumed in the middle of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from sdsopt.reference import SDSLinear, SDSSchedule
from toy import assert_same

TOTAL, WARM_UP, PHASES = 11, 2, 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = SDSLinear.around(nn.Linear(7, 8), rank=3, alpha=2.0)
        self.second = SDSLinear.around(nn.Linear(8, 6), rank=2, alpha=2.0)

    def loss(self, step: int) -> torch.Tensor:
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step))
        return (self.second(torch.tanh(self.first(x))) - x[:, :6]).square().mean()


def build(make: Callable[..., Optimizer]) -> tuple[Net, Optimizer, SDSSchedule]:
    net = Net()
    optimizer = make([p for p in net.parameters() if p.requires_grad])
    return net, optimizer, SDSSchedule(net, optimizer, TOTAL, warmup_steps=WARM_UP, phases=PHASES)


def run(net: Net, optimizer: Optimizer, schedule: SDSSchedule, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        net.loss(step).backward()
        optimizer.step()
        schedule.step()


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.02)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def test_refreshes_become_rarer() -> None:
    *_, schedule = build(adamw)
    # Nine steps after the warm-up, in three phases of three, whose intervals are 1, 2 and 3.
    assert [step for step in range(TOTAL + 3) if schedule.refreshes_after(step)] == [3, 4, 5, 6, 8, 11]
    paper = SDSSchedule(Net(), adamw([nn.Parameter(torch.zeros(1))]), 1010)
    refreshes = [step - 10 for step in range(1011) if paper.refreshes_after(step)]
    assert refreshes[:200] == list(range(1, 201))
    assert [step for step in refreshes if step > 800] == list(range(805, 1001, 5))


def test_what_happens_when(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer, schedule = build(adamw)
    refreshed: list[int] = []
    original = SDSLinear.refresh
    monkeypatch.setattr(SDSLinear, "refresh", lambda self: refreshed.append(schedule.steps) or original(self))
    run(net, optimizer, schedule, 0, 1)
    assert not net.first.is_split
    optimizer.zero_grad()
    net.loss(1).backward()
    optimizer.step()
    deltas = net.first.delta, net.second.delta
    assert len(optimizer.state) == 4
    schedule.step()
    assert net.first.is_split and net.second.is_split
    for layer, delta in zip((net.first, net.second), deltas, strict=True):
        torch.testing.assert_close(layer.delta, delta, rtol=1e-5, atol=1e-6)
    assert not optimizer.state
    assert not refreshed
    run(net, optimizer, schedule, 2, TOTAL)
    assert refreshed == [step for step in (3, 4, 5, 6, 8, 11) for _ in range(2)]
    assert len(optimizer.state) == 4


def test_state_of_other_parameters_is_kept() -> None:
    net = Net()
    head = nn.Parameter(torch.ones(1))
    optimizer = adamw([*(p for p in net.parameters() if p.requires_grad), head])
    schedule = SDSSchedule(net, optimizer, 5, warmup_steps=1, phases=1)
    (net.loss(0) * head).sum().backward()
    optimizer.step()
    schedule.step()
    assert list(optimizer.state) == [head]


@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("stop", [1, 2, 3, 7])
def test_resume_is_bit_equal(make: Callable[..., Optimizer], stop: int) -> None:
    """In the warm-up, at the split, in a phase, and between two refreshes of the last phase."""
    net, optimizer, schedule = build(make)
    run(net, optimizer, schedule, 0, stop)
    saved = copy.deepcopy([net.state_dict(), optimizer.state_dict(), schedule.state_dict()])
    run(net, optimizer, schedule, stop, TOTAL)

    other, other_optimizer, other_schedule = build(make)
    for part, state in zip((other, other_optimizer, other_schedule), saved, strict=True):
        part.load_state_dict(state)
    assert other.first.is_split == (stop >= WARM_UP)
    run(other, other_optimizer, other_schedule, stop, TOTAL)
    assert_same(net, other)


def test_it_learns() -> None:
    net, optimizer, schedule = build(adamw)
    before = net.loss(99).item()
    run(net, optimizer, schedule, 0, TOTAL)
    assert net.loss(99).item() < 0.9 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 10}, "a run of 10 steps"),
        ({"total_steps": 20, "warmup_steps": 0}, "at least 1, got 0 and 5"),
        ({"total_steps": 20, "phases": 0}, "at least 1, got 10 and 0"),
    ],
)
def test_bad_schedules(arguments: dict[str, int], message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        SDSSchedule(net, adamw(net.parameters()), **arguments)
    with pytest.raises(ValueError, match="no SDSLinear"):
        SDSSchedule(nn.Linear(2, 2), adamw(net.parameters()), 20)
