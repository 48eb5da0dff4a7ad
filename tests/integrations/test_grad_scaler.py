"""Loss scaling in a loop by hand: `torch.amp.GradScaler`, which runs on the CPU too."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from loop import METHODS, Loop, assert_corrected, assert_resumes, corrected, no_scaler
from sdsopt import SDSPreconditioner
from toy import Network, assert_same

methods = pytest.mark.parametrize("method", METHODS)


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)  # pyright: ignore


def loop(method: str, scale: bool = True, **options: Any) -> Loop:
    network = Network()
    return Loop(network, corrected(network, method), scaler=scaler() if scale else no_scaler(), **options)


@methods
def test_scaled_training_is_the_unscaled_one(method: str) -> None:
    """To the last bit, since scales are powers of two. Clipping must see unscaled gradients."""
    scaled, unscaled, plain = (
        loop(*case, clip=0.3, accumulate=2).run(0, 16) for case in ((method,), (method, False), ("plain",))
    )
    assert scaled.scaler.get_scale() == 256 * 2**2  # it has grown twice
    assert_same(scaled.network, unscaled.network)
    assert_corrected(scaled.network, plain.network)


@methods
def test_a_resumed_run_goes_on_with_its_scale(method: str) -> None:
    whole = assert_resumes(lambda: loop(method, clip=0.3, overflow_at=2))
    assert whole.scaler.get_scale() == 256 / 2 * 2  # halved by the overflow; grown at 6, which needs 3, 4 and 5
    assert whole.scaler.state_dict()["_growth_tracker"] == 2
    assert_corrected(whole.network, loop("plain", clip=0.3, overflow_at=2).run(0, 8).network)


@methods
def test_an_overflow_changes_nothing_but_the_scale(method: str) -> None:
    run = loop(method, clip=0.3, overflow_at=3).run(0, 3)
    network, state = copy.deepcopy(run.network), copy.deepcopy(run.optimizer.state_dict())
    run.run(3, 4)
    assert_same(run.network, network)
    torch.testing.assert_close(run.optimizer.state_dict(), state, rtol=0, atol=0)
    assert run.scaler.get_scale() == 256  # doubled after 3 good steps, halved

    without = loop(method, clip=0.3).run(0, 3).run(4, 6)
    assert_same(run.run(4, 6).network, without.network)
    assert_corrected(run.network, loop("plain", clip=0.3, overflow_at=3).run(0, 6).network)


@methods
def test_half_precision_under_autocast(method: str) -> None:
    whole = assert_resumes(lambda: loop(method, autocast=torch.float16))
    full = loop(method, scale=False).run(0, 8)
    for half, single in zip(whole.network.parameters(), full.network.parameters(), strict=True):
        assert not torch.equal(half, single)
        torch.testing.assert_close(half, single, rtol=0.05, atol=0.05)
    assert_corrected(whole.network, loop("plain", autocast=torch.float16).run(0, 8).network)


@methods
def test_a_scale_that_overflows_by_itself_is_lowered(method: str) -> None:
    """Float16 gradients overflow at the first steps of most runs."""

    def overflowing(method: str) -> Loop:
        run = loop(method, autocast=torch.float16)
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # pyright: ignore
        return run

    run = overflowing(method).run(0, 1)
    assert_same(run.network, Network())
    run.run(1, 40)
    assert run.scaler.get_scale() < 2.0**40
    assert_corrected(run.network, overflowing("plain").run(0, 40).network)


def test_the_fused_inner_optimizer_does_not_unscale_a_second_time() -> None:
    """torch's fused optimizers take the scale themselves, and would apply it to what is unscaled already."""

    def fused(method: str, scale: bool) -> Loop:
        network = Network()
        inner = AdamW(network.parameters(), lr=0.02, fused=True)
        assert inner._step_supports_amp_scaling  # pyright: ignore
        optimizer = inner if method == "plain" else SDSPreconditioner(inner, network, method)
        return Loop(network, optimizer, scaler=scaler() if scale else no_scaler())

    scaled = fused("sds", True).run(0, 6)
    assert scaled.optimizer._step_supports_amp_scaling is False  # pyright: ignore
    assert_same(scaled.network, fused("sds", False).run(0, 6).network)
    assert_corrected(scaled.network, fused("plain", False).run(0, 6).network)
