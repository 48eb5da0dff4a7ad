"""Roots that serve for several steps: which ones a step uses, and when they are computed anew."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from oracle import corrected
from sdsopt import SDSPreconditioner, find_pairs
from sdsopt.errors import UnsupportedCorrectionError
from sdsopt.linalg import EighInverseRoot, InverseRoot, RootResult
from toy import Network, assert_same, lora_linear, train

DAMPING = 1e-6
RATE = 0.05


@dataclass(frozen=True)
class Counting(InverseRoot):
    """Counts the calls."""

    ranks: list[int] = field(default_factory=list)

    def reduce(self, factor: Tensor) -> Tensor:
        return EighInverseRoot().reduce(factor)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        self.ranks.append(reduced.shape[-1])
        return EighInverseRoot().compute(reduced, exponents, damping)


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=RATE)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def wrapped(model: Network, update_every: int, inner: Callable[[nn.Module], Optimizer] = sgd, **options: Any) -> Any:
    return SDSPreconditioner(inner(model), model, update_every=update_every, **options)


class Followed:
    """A network, and the steps that the formula says it takes with SGD and the roots of other factors."""

    def __init__(self) -> None:
        self.model = Network(dtype=torch.float64)
        self.roots_of: list[tuple[Tensor, Tensor]] = []
        self.renew()

    def renew(self) -> None:
        """From now on the roots shall be those of the present factors."""
        self.roots_of = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in find_pairs(self.model)]

    def step(self, optimizer: Optimizer, batch: int) -> None:
        self.model.zero_grad()
        self.model.loss(batch).backward()
        expected: list[tuple[Tensor, Tensor]] = []
        for pair, (A, B) in zip(find_pairs(self.model), self.roots_of, strict=True):
            assert pair.A.grad is not None
            assert pair.B.grad is not None
            gA, gB = corrected(A, B, pair.A.grad, pair.B.grad, 0.5, DAMPING)
            expected.append((pair.A.detach() - RATE * gA, pair.B.detach() - RATE * gB))
        optimizer.step()
        for pair, (A, B) in zip(find_pairs(self.model), expected, strict=True):
            torch.testing.assert_close(pair.A.detach(), A, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(pair.B.detach(), B, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("update_every", [1, 2, 3])
def test_roots_are_those_of_the_last_multiple(update_every: int) -> None:
    run = Followed()
    optimizer = wrapped(run.model, update_every)
    for step in range(7):
        if step % update_every == 0:
            run.renew()
        run.step(optimizer, step)


@pytest.mark.parametrize(("update_every", "expected"), [(1, 7), (2, 4), (3, 3), (100, 1)])
def test_how_often_they_are_computed(update_every: int, expected: int) -> None:
    model, counting = Network(), Counting()
    train(model, wrapped(model, update_every, inverse_root=counting), 7)
    assert sorted(counting.ranks) == [3] * expected + [4] * expected


@pytest.mark.parametrize("inner", [sgd, adamw])
@pytest.mark.parametrize("correction", ["sds", "sds-split", "scaled", "lora-pro", "reflora"])
def test_resume_at_a_multiple_equals_uninterrupted(correction: str, inner: Callable[[nn.Module], Optimizer]) -> None:
    model, plain = Network(), Network()
    optimizer = wrapped(model, 3, inner, correction=correction)
    train(model, optimizer, 3)
    resumed = Network()
    resumed.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 4, first=3)

    again = wrapped(resumed, 3, inner, correction=correction)
    again.load_state_dict(state)
    train(resumed, again, 4, first=3)
    assert_same(resumed, model)

    train(plain, wrapped(plain, 1, inner, correction=correction), 7)
    assert not torch.equal(plain.first.A, model.first.A)  # old roots make a difference


def loaded(run: Followed, optimizer: Any) -> Any:
    again = wrapped(run.model, 5)
    again.load_state_dict(optimizer.state_dict())
    return again


def loaded_in_place(run: Followed, optimizer: Any) -> Any:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def other_weights(run: Followed, optimizer: Any) -> Any:
    run.model.load_state_dict(Network(seed=5, dtype=torch.float64).state_dict())
    return optimizer


def counted_anew(run: Followed, optimizer: Any) -> Any:
    optimizer.inner.load_state_dict(sgd(run.model).state_dict())  # around the wrapper
    for group in optimizer.param_groups:
        group["sdsopt_steps"] = 21
    return optimizer


def copied(run: Followed, optimizer: Any) -> Any:
    run.model, optimizer = copy.deepcopy((run.model, optimizer))
    return optimizer


def other_data(run: Followed, optimizer: Any) -> Any:
    vector = nn.utils.parameters_to_vector(run.model.parameters())
    nn.utils.vector_to_parameters(1.1 * vector, run.model.parameters())  # through .data
    return optimizer


def smaller_rank(run: Followed, optimizer: Any) -> Any:
    for layer in (run.model.first, run.model.second):
        layer.A.data, layer.B.data = layer.A.data[:2], layer.B.data[:, :2]
    return optimizer


def refreshed(run: Followed, optimizer: Any) -> Any:
    for parameter in run.model.parameters():
        parameter.data.mul_(1.1)
    optimizer.refresh()
    return optimizer


CHANGES = [
    loaded,
    loaded_in_place,
    other_weights,
    counted_anew,
    copied,
    other_data,
    smaller_rank,
    refreshed,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_outside_makes_them_new(change: Callable[[Followed, Any], Any]) -> None:
    """Between multiples: at once, and not again before the next one."""
    run = Followed()
    optimizer = wrapped(run.model, 5)
    run.step(optimizer, 0)
    run.step(optimizer, 1)
    optimizer = change(run, optimizer)
    run.renew()
    run.step(optimizer, 2)
    run.step(optimizer, 3)


def test_one_changed_pair_leaves_the_others() -> None:
    run, counting = Followed(), Counting()
    optimizer = wrapped(run.model, 5, inverse_root=counting)
    run.step(optimizer, 0)
    counting.ranks.clear()
    with torch.no_grad():
        run.model.second.A.mul_(2)
    first = run.roots_of[0]
    run.renew()
    run.roots_of[0] = first
    run.step(optimizer, 1)
    assert counting.ranks == [3]


def test_a_masked_diagonal_makes_them_new() -> None:
    """AdaLoRA's budget sets some of it to zero after a step."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config)
    [pair] = find_pairs(model)
    assert pair.E is not None
    nn.init.normal_(pair.E)
    counting = Counting()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=RATE), model, update_every=5, inverse_root=counting)
    for masked in (False, False, True, False):
        if masked:
            with torch.no_grad():
                pair.E[1] = 0
        counting.ranks.clear()
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().sum().backward()
        steps = optimizer.param_groups[0].get("sdsopt_steps", 0)
        optimizer.step()
        assert bool(counting.ranks) == (steps == 0 or masked)


def test_a_pair_that_joins_later_gets_its_own() -> None:
    model, counting = Network(), Counting()
    optimizer = wrapped(model, 5, inverse_root=counting)
    for parameter in model.second.parameters():
        parameter.requires_grad_(False)
    train(model, optimizer, 2)
    assert counting.ranks == [4]
    for parameter in model.second.parameters():
        parameter.requires_grad_(True)
    train(model, optimizer, 2, first=2)
    assert counting.ranks == [4, 3]


def test_a_step_with_zero_rates_does_not_count() -> None:
    """A warm-up starts so, and distributed checkpoints take such a step to have the state created."""
    run = Followed()
    optimizer = wrapped(run.model, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    train(run.model, optimizer, 1)
    optimizer.param_groups[0]["lr"] = RATE
    run.step(optimizer, 0)
    run.step(optimizer, 1)
    run.renew()
    run.step(optimizer, 2)


def test_a_step_that_failed_changes_nothing() -> None:
    run = Followed()
    optimizer = wrapped(run.model, 4)
    run.step(optimizer, 0)
    with mock.patch.object(optimizer.inner, "step", side_effect=RuntimeError("no")), pytest.raises(RuntimeError):
        optimizer.step()
    run.step(optimizer, 1)
    run.step(optimizer, 2)


@pytest.mark.parametrize("update_every", [1, 3])
def test_what_is_kept(update_every: int) -> None:
    """Two r×r matrices in float64 of each pair, and nothing where each step has its own."""
    layer = lora_linear(rows=12, columns=10, rank=4)
    optimizer = SDSPreconditioner(SGD(layer.parameters(), lr=RATE), layer, update_every=update_every)
    layer.backward_from(torch.ones(12, 10))
    optimizer.step()
    kept = optimizer._engine._roots._of  # pyright: ignore
    tensors = [root for of_pair in kept.values() for roots in of_pair[:2] for root in roots.values()]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors[:1]) == (2 * 16 * 8 if update_every > 1 else 0)
    assert [tuple(tensor.shape) for tensor in tensors] == ([(1, 4, 4)] * 2 if update_every > 1 else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"correction": "lora"}, "computes no roots of Gram matrices, so update_every changes nothing"),
        ({"correction": "altlora"}, "needs the roots of every step; leave out update_every"),
        ({"correction": "lora-rite"}, "needs the roots of every step"),
        ({"correction": "lora-rite-matrix"}, "needs the roots of every step"),
        ({"transport": "moments"}, "needs the roots of every step"),
        ({"rebalance_every": 2}, "needs the roots of every step"),
    ],
)
def test_what_it_does_not_go_with(options: dict[str, Any], message: str) -> None:
    model = Network()
    with pytest.raises(UnsupportedCorrectionError, match=message):
        wrapped(model, 2, adamw, **options)


@pytest.mark.parametrize("options", [{"update_every": 2}, {"correction": "altlora"}, {"rebalance_every": 2}])
def test_a_captured_step_that_the_next_one_is_not_like(options: dict[str, Any]) -> None:
    """Without a GPU here: as if its stream were being captured."""
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=RATE, momentum=0.9), model, **options)
    model.loss().backward()
    before = copy.deepcopy(model)
    capturing = mock.patch.multiple(torch.cuda, is_available=lambda: True, is_current_stream_capturing=lambda: True)
    with capturing, pytest.raises(UnsupportedCorrectionError, match=r"a CUDA graph .* would repeat that one"):
        optimizer.step()
    assert_same(model, before)
