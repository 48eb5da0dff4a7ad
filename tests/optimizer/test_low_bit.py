"""Optimizers whose state has few bits: it stays so inside, and learning rates that are tensors stay tensors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from sdsopt import SDSPreconditioner
from toy import Network, assert_same, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

# From this size on, both packages keep low-bit state; smaller tensors have it in float32.
LARGE = 4096


def bits(tensor: Tensor) -> float:
    """Of one element, without the scale of each block."""
    codes = getattr(tensor, "codes", tensor)  # torchao packs them into a tensor of its own
    return 8 * codes.numel() * codes.element_size() / tensor.numel()


def moments(state: dict[str, Any]) -> list[Tensor]:
    return [state[key] for key in ("state1", "state2", "exp_avg", "exp_avg_sq") if key in state]


def classes() -> list[Any]:
    names = {
        "bitsandbytes.optim": ["AdamW8bit", "PagedAdamW8bit", "Adam8bit", "Lion8bit", "AdEMAMix8bit", "AdamW"],
        "torchao.optim": ["AdamW8bit", "AdamW4bit", "AdamWFp8"],
    }
    return [(module, name) for module in names for name in names[module]]


@pytest.fixture
def make(module: str, name: str) -> Iterator[Callable[[nn.Module], Optimizer]]:
    cls = getattr(pytest.importorskip(module, exc_type=ImportError), name)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, for many seconds
        yield lambda model: cls(model.parameters(), lr=0.01)


@pytest.mark.parametrize(("module", "name"), classes())
@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_large_factors_have_low_bit_state_before_and_after_a_checkpoint(
    make: Callable[[nn.Module], Optimizer], name: str, correction: str
) -> None:
    expected = 4 if "4bit" in name else 8 if "8" in name else 32
    model = Network(width=1536)
    optimizer = SDSPreconditioner(make(model), model, correction)
    train(model, optimizer, 2)
    again = SDSPreconditioner(make(model), model, correction)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for each in (optimizer, again):
        sizes = {p.numel(): {bits(m) for m in moments(each.state[p])} for p in model.parameters()}
        large = {size: found for size, found in sizes.items() if size >= LARGE}
        small = [found for size, found in sizes.items() if size < LARGE]
        assert set(large) == {model.first.B.numel(), model.second.A.numel()}
        assert all(found == {expected} for found in large.values())
        assert small
        assert all(found == {32} for found in small)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: LambdaLR(o, lambda step: 1 / (step + 1)),
    "cosine": lambda o: CosineAnnealingLR(o, T_max=6),
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=6, cycle_momentum=False),
    "plateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("module", "name"), [("torchao.optim", "AdamW8bit")])
def test_a_tensor_learning_rate_stays_one_and_follows_its_schedule(
    make: Callable[[nn.Module], Optimizer], scheduler: str
) -> None:
    def run(correction: str | None) -> tuple[Network, list[float]]:
        model = Network()
        inner = make(model)
        optimizer = inner if correction is None else SDSPreconditioner(inner, model, correction)
        schedule = SCHEDULERS[scheduler](optimizer)
        rates: list[float] = []
        for step in range(5):
            train(model, optimizer, 1, step)
            schedule.step() if isinstance(schedule, LRScheduler) and scheduler != "plateau" else schedule.step(1.0)
            assert isinstance(inner.param_groups[0]["lr"], Tensor)
            rates.append(float(inner.param_groups[0]["lr"]))
        return model, rates

    (bare, bare_rates), (plain, plain_rates), (corrected, corrected_rates) = run(None), run("lora"), run("sds")
    assert bare_rates == plain_rates == corrected_rates
    assert len(set(bare_rates)) > 1
    assert_same(bare, plain)
    assert not torch.equal(bare.first.A, corrected.first.A)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_torchaos_compiled_step(name: str) -> None:
    """As users run it. It takes long, but it is what a step is."""
    optim = pytest.importorskip("torchao.optim", exc_type=ImportError)
    models = Network(width=1536), Network(width=1536), Network(width=1536)
    optimizers = [getattr(optim, name)(model.parameters(), lr=0.01) for model in models]
    train(models[0], optimizers[0], 2)
    train(models[1], SDSPreconditioner(optimizers[1], models[1], "lora"), 2)
    train(models[2], SDSPreconditioner(optimizers[2], models[2], "sds"), 2)
    assert_same(models[0], models[1])
    assert not torch.equal(models[0].first.A, models[2].first.A)
