"""Hook mode equals the wrapper, in every way in which gradients come about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
import torch_optimizer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from recorder import corrected_gradients
from sdsopt import InverseRoot, SDSPreconditioner, attach
from sdsopt.linalg.base import RootResult
from sdsopt.linalg.eigh import EighInverseRoot
from tiny_models import MODELS
from toy import Network, assert_same, train

LINEAR = ["lora", "sds", "scaled"]


@dataclass
class CountingRoot(InverseRoot):
    """Counts the batched calls."""

    batches: list[int] = field(default_factory=list)

    def reduce(self, factor: Tensor) -> Tensor:
        return EighInverseRoot().reduce(factor)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        self.batches.append(len(reduced))
        return EighInverseRoot().compute(reduced, exponents, damping)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def backward(model: Any, loss: Callable[[Any], Tensor], **options: Any) -> dict[str, Tensor]:
    """The gradients that hook mode leaves in `.grad`."""
    with attach(model, **options):
        loss(model).backward()
    return gradients(model)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("correction", LINEAR)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_wrapper(name: str, correction: str) -> None:
    model, batch = MODELS[name]()
    torch.manual_seed(0)  # T5 keeps a dropout of its own
    model(**batch).loss.backward()
    wrapped = corrected_gradients(model, correction)
    expected = {n: wrapped[p] for n, p in model.named_parameters() if p in wrapped}
    model.zero_grad()
    torch.manual_seed(0)
    with attach(model, correction):
        model(**batch).loss.backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=0.01), lambda p: SGD(p, lr=0.1, momentum=0.9)])
@pytest.mark.parametrize("correction", LINEAR)
def test_training_ends_where_the_wrappers_does(correction: str, make: Callable[[Any], Optimizer]) -> None:
    hooked, wrapped = Network(dtype=torch.float64), Network(dtype=torch.float64)
    with attach(hooked, correction):
        train(hooked, make(hooked.parameters()), steps=10)
    train(wrapped, SDSPreconditioner(make(wrapped.parameters()), wrapped, correction), steps=10)
    for one, other in zip(hooked.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_correction_acts() -> None:
    plain, hooked = Network(), Network()
    plain.loss().backward()
    attach(hooked)
    hooked.loss().backward()
    for name, gradient in gradients(plain).items():
        assert torch.equal(gradient, gradients(hooked)[name]) == name.startswith("head"), name


def test_accumulation_and_several_backward_passes_add_up() -> None:
    whole = Network(dtype=torch.float64)
    expected = backward(whole, lambda m: m.loss(0) + m.loss(1) + 2 * m.loss(2))
    model = Network(dtype=torch.float64)
    with attach(model):
        model.loss(0).backward()
        model.loss(1).backward()
        twice = model.loss(2)
        twice.backward(retain_graph=True)
        twice.backward()
    assert_close(gradients(model), expected)


def test_roots_are_computed_once_for_all_pairs_until_a_factor_changes() -> None:
    counter = CountingRoot()
    model = Network()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(model, inverse_root=counter)
    for _ in range(3):
        model.loss().backward()
    assert counter.batches == [2, 2]  # one call for each of the two ranks, with A and B of one pair
    optimizer.step()
    for _ in range(3):
        model.loss().backward()
    assert counter.batches == [2, 2] * 2
    with torch.no_grad():
        model.first.A.mul_(2)
    model.loss().backward()
    assert counter.batches == [2, 2] * 3


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch_optimizer's deprecated overloads
def test_optimizers_that_write_to_data_are_noticed(set_to_none: bool) -> None:
    """Their steps leave torch's version counters as they were."""
    models = hooked, wrapped = Network(dtype=torch.float64), Network(dtype=torch.float64)
    attach(hooked)
    for model in models:
        optimizer: Optimizer = torch_optimizer.RAdam(model.parameters(), lr=0.01)
        version = model.first.A._version
        if model is wrapped:
            optimizer = SDSPreconditioner(optimizer, model)
        for step in range(4):
            optimizer.zero_grad(set_to_none)
            model.loss(step).backward()
            optimizer.step()
        assert model.first.A._version == version
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_loop_by_hand_that_writes_to_data_is_noticed() -> None:
    hooked, wrapped = Network(dtype=torch.float64), Network(dtype=torch.float64)
    attach(hooked)
    for step in range(3):
        hooked.zero_grad()
        hooked.loss(step).backward()
        for parameter in hooked.parameters():
            assert parameter.grad is not None
            parameter.data -= 0.1 * parameter.grad
    train(wrapped, SDSPreconditioner(SGD(wrapped.parameters(), lr=0.1), wrapped), steps=3)
    for one, other in zip(hooked.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_refresh_takes_up_what_torch_does_not_see() -> None:
    model, fresh = Network(), Network()
    handle = attach(model)
    model.loss().backward()
    for network in (model, fresh):
        network.first.B.data.mul_(3)
    handle.refresh()
    before = gradients(model)
    model.loss().backward()
    second = {name: gradient - before[name] for name, gradient in gradients(model).items()}
    assert_close(second, backward(fresh, Network.loss))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    def loss(model: Network) -> Tensor:
        x = torch.ones(4, 10, dtype=torch.float64, requires_grad=True)
        hidden = cast("Tensor", checkpoint(model.first, x, use_reentrant=use_reentrant))
        return model.head(checkpoint(model.second, hidden, use_reentrant=use_reentrant)).square().mean()

    def plain(model: Network) -> Tensor:
        return model.head(model.second(model.first(torch.ones(4, 10, dtype=torch.float64)))).square().mean()

    found = backward(Network(dtype=torch.float64), loss)
    assert_close(found, backward(Network(dtype=torch.float64), plain))


def test_a_steps_inside_backward_see_the_weights_of_its_beginning() -> None:
    """As with torchtune's optimizer_in_bwd: each parameter is stepped as soon as its gradient is there."""
    early, late = Network(dtype=torch.float64), Network(dtype=torch.float64)
    counter = CountingRoot()
    for model in (early, late):
        attach(model, inverse_root=counter)
    optimizers = {p: SGD([p], lr=0.1) for p in early.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[cast("nn.Parameter", parameter)].step()
        parameter.grad = None

    for parameter in early.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for number in range(3):
        early.loss(number).backward()
    assert counter.batches == [2, 2] * 3
    train(late, SGD(late.parameters(), lr=0.1), steps=3)
    assert_same(early, late)


@pytest.mark.parametrize("attach_first", [True, False])
def test_compiled_models(attach_first: bool) -> None:
    model, eager = Network(dtype=torch.float64), Network(dtype=torch.float64)
    x = torch.ones(4, 10, dtype=torch.float64)
    handle = attach(model) if attach_first else None
    compiled = cast("Callable[[Tensor], Tensor]", torch.compile(model, backend="aot_eager"))
    compiled(x)
    handle = handle or attach(model)
    for _ in range(2):
        compiled(x).square().mean().backward()
    assert_close(gradients(model), backward(eager, lambda m: 2 * m(x).square().mean()))
    handle.remove()
    model.zero_grad()
    compiled(x).square().mean().backward()
    eager.zero_grad()
    eager(x).square().mean().backward()
    assert_close(gradients(model), gradients(eager))


def test_autograd_grad_returns_corrected_gradients() -> None:
    model = Network()
    expected = backward(Network(), Network.loss)
    attach(model)
    found = torch.autograd.grad(model.loss(), list(model.parameters()))
    assert_close(dict(zip(expected, found, strict=True)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_under_autocast(dtype: torch.dtype) -> None:
    model = Network().to(dtype)
    attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        model.loss().backward()
    found = gradients(model)
    assert {gradient.dtype for gradient in found.values()} == {dtype}
    model.zero_grad()
    attach(model).remove()
    with torch.autocast("cpu", torch.bfloat16):
        model.loss().backward()
    wrapped = corrected_gradients(model, "sds")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], wrapped[parameter])


def test_a_frozen_partner() -> None:
    model = Network()
    model.first.A.requires_grad_(False)
    model.loss().backward()
    expected = corrected_gradients(model, "sds")[model.first.B]
    model.zero_grad()
    assert attach(model).num_factors == 3
    model.loss().backward()
    assert model.first.A.grad is None
    assert model.first.B.grad is not None
    torch.testing.assert_close(model.first.B.grad, expected)


def test_a_graph_through_the_correction() -> None:
    """create_graph=True: the second derivative is that of the corrected gradient."""
    model = Network(dtype=torch.float64)
    manager: AbstractContextManager[Any] = attach(model)
    with manager:
        [gradient] = torch.autograd.grad(model.loss(), [model.first.A], create_graph=True)
        assert gradient.requires_grad
        [second] = torch.autograd.grad(gradient.square().sum(), [model.head.weight])
    [plain] = torch.autograd.grad(model.loss(), [model.first.A], create_graph=True)
    [other] = torch.autograd.grad(plain.square().sum(), [model.head.weight])
    assert second.abs().max() > 0
    assert not torch.allclose(second, other)
