"""Learning-rate schedulers, built on the wrapper or, beside hooks, on the bare optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler

from loop import METHODS, Loop, adamw, assert_corrected, assert_resumes, corrected
from toy import Network, assert_same

Make = Callable[[Optimizer], Any]


def warmup_and_decay(optimizer: Optimizer) -> Any:
    parts: list[Any] = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        lr_scheduler.ExponentialLR(optimizer, 0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Make] = {
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.05, step_size_up=3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=10),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "sequential": warmup_and_decay,
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o, 0.1, total_iters=2)]
    ),
}
schedulers = pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)


def loop(method: str, make: Make, inner: Callable[[Any], Optimizer] = adamw) -> Loop:
    network = Network()
    optimizer = corrected(network, method, inner)
    return Loop(network, optimizer, make(optimizer))


def rates(run: Loop) -> list[Any]:
    """What the scheduler sets, batch by batch."""
    seen: list[Any] = []
    for batch in range(8):
        run.run(batch, batch + 1)
        [group] = run.optimizer.param_groups
        seen.append((group["lr"], group.get("betas"), group.get("momentum")))
    return seen


@schedulers
@pytest.mark.parametrize("method", METHODS)
def test_rates_are_those_of_the_bare_optimizer_and_a_run_resumes(method: str, make: Make) -> None:
    plain, run = loop("plain", make), loop(method, make)
    expected = rates(plain)
    assert rates(run) == expected
    assert len(set(expected)) > 2
    assert_corrected(run.network, plain.network)
    assert_same(assert_resumes(lambda: loop(method, make)).network, run.network)


@schedulers
def test_the_rates_reach_the_inner_optimizer(make: Make) -> None:
    """With the correction that corrects nothing, training is the bare optimizer's."""
    assert_same(loop("lora", make).run(0, 8).network, loop("plain", make).run(0, 8).network)


@pytest.mark.parametrize("name", ["one-cycle", "cyclic"])
@pytest.mark.parametrize("inner", [adamw, lambda p: SGD(p, lr=0.02, momentum=0.9)], ids=["betas", "momentum"])
def test_momentum_is_cycled(name: str, inner: Callable[[Any], Optimizer]) -> None:
    plain, run = (loop(method, SCHEDULERS[name], inner) for method in ("plain", "sds"))
    expected = rates(plain)
    assert rates(run) == expected
    assert len({momentum for _, *momenta in expected for momentum in momenta if momentum is not None}) > 2
    assert_corrected(run.network, plain.network)


def test_a_scheduler_on_the_inner_optimizer_drives_the_wrapper_too() -> None:
    """Lightning refuses it; torch does not, and the groups are the same objects."""
    network = Network()
    optimizer = corrected(network, "sds")
    scheduler = lr_scheduler.ExponentialLR(optimizer.inner, 0.5)  # pyright: ignore
    Loop(network, optimizer).run(0, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_schedulers_that_are_stepped_too_early_warn_as_ever() -> None:
    network = Network()
    scheduler = lr_scheduler.ExponentialLR(corrected(network, "sds"), 0.5)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


def test_tensor_learning_rates_stay_tensors() -> None:
    """What torch.compile asks for, lest each rate be compiled anew."""
    rate = torch.tensor(0.02)
    run = loop("sds", SCHEDULERS["lambda"], lambda p: torch.optim.AdamW(p, lr=rate, weight_decay=0.1)).run(0, 3)
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.02 * 0.9**3)
    assert_corrected(run.network, loop("plain", SCHEDULERS["lambda"]).run(0, 3).network)
