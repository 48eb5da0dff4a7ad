"""`torch.compile` of the step, of the model, and of both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

from loop import Loop, assert_corrected, corrected
from sdsopt import attach, find_pairs
from sdsopt.errors import DoubleCorrectionError, StaleParametersError
from toy import Network, assert_same

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler record function.*"),
]


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def compiled_step(optimizer: Optimizer, backend: str = "eager") -> None:
    """As a training loop that calls the compiled function in place of `optimizer.step`."""
    optimizer.step = torch.compile(optimizer.step, backend=backend)  # pyright: ignore


def loop(method: str, backend: str | None = None, make: Callable[[Any], Optimizer] = sgd, **options: Any) -> Loop:
    network = Network(dtype=torch.float64)
    optimizer = corrected(network, method, make, **options)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    if backend is not None:
        compiled_step(optimizer, backend)
    return Loop(network, optimizer, scheduler)


@pytest.mark.parametrize(
    ("backend", "method", "options"),
    [
        ("aot_eager", "sds", {}),
        ("eager", "sds-split", {"max_grad_norm": 0.1, "max_workspace_bytes": 1024}),
        ("aot_eager", "hooks", {}),
        ("eager", "lora-rite-matrix", {}),
        ("eager", "sds", {"update_every": 2}),
    ],
)
def test_a_compiled_step_is_the_step(backend: str, method: str, options: dict[str, Any]) -> None:
    run = loop(method, backend, **options).run(0, 5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # pyright: ignore  # it was compiled
    expected = loop(method, **options).run(0, 5)
    for one, other in zip(run.network.parameters(), expected.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    without_roots = {name: value for name, value in options.items() if name != "update_every"}
    assert_corrected(run.network, loop("lora", **without_roots).run(0, 5).network)


def test_a_compiled_adamw_is_given_the_same_gradients() -> None:
    """torch computes AdamW's bias correction in float32 when it compiles it, bare or wrapped."""
    runs = [loop(m, "eager", lambda p: AdamW(p, lr=0.02)).run(0, 4) for m in ("sds", "hooks", "plain")]
    wrapped, hooked, plain = (run.network for run in runs)
    for one, other in zip(wrapped.parameters(), hooked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert_corrected(wrapped, plain)


# Mistakes that are made after the step was compiled: what was true then must be checked again.


def test_a_replaced_factor_is_noticed() -> None:
    run = loop("sds", "eager").run(0, 2)
    run.network.first.A = run.network.first.A.detach()
    before = copy.deepcopy(run.network)
    with pytest.raises(StaleParametersError, match=r"factor A of first\[default\] was replaced"):
        run.run(2, 3)
    assert_same(run.network, before)


def test_a_factor_without_a_hook_is_noticed() -> None:
    network = Network()
    network.first.A.requires_grad_(False)
    optimizer = corrected(network, "hooks", sgd)
    compiled_step(optimizer)
    run = Loop(network, optimizer).run(0, 2)
    network.first.A.requires_grad_(True)
    before = copy.deepcopy(network)
    with pytest.raises(StaleParametersError, match=r"factor A of first\[default\] was not corrected"):
        run.run(2, 3)
    assert_same(network, before)


def test_a_second_correction_is_noticed() -> None:
    run, expected = loop("sds", "eager").run(0, 2), loop("sds")
    before = copy.deepcopy(run.network)
    handle = attach(run.network)
    with pytest.raises(DoubleCorrectionError):
        run.run(2, 3)
    assert_same(run.network, before)
    handle.remove()
    run.optimizer.zero_grad()
    run.run(2, 4)
    for one, other in zip(run.network.parameters(), expected.run(0, 4).network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["sds", "sds-split", "hooks"])
def test_a_compiled_model(method: str) -> None:
    """Built on the compiled model, whose modules and parameters are the original's."""
    network = Network()
    model: Any = torch.compile(network, backend="aot_eager")
    optimizer = corrected(model, method)
    assert [pair.name for pair in find_pairs(model)] == ["_orig_mod.first[default]", "_orig_mod.second[default]"]
    for batch in range(3):
        x = torch.randn(16, 10, generator=torch.Generator().manual_seed(100 + batch))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected, plain = (Network(), Network())
    Loop(expected, corrected(expected, method)).run(0, 3)
    Loop(plain, corrected(plain, "plain")).run(0, 3)
    for one, other in zip(network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_corrected(network, plain)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sds", "sds-split", "hooks"])
def test_inductor(method: str) -> None:
    """The default backend, which writes and compiles C++."""
    run, expected = loop(method, "inductor").run(0, 4), loop(method).run(0, 4)
    for one, other in zip(run.network.parameters(), expected.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert_corrected(run.network, loop("plain").run(0, 4).network)
