"""`rebalance_every`: other factors of the same product, with everything that belongs to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

import oracle
from sdsopt import GramPower, SDSPreconditioner, find_pairs
from tiny_models import MODELS
from toy import LoRALinear, Network, factor, lora_linear, train


def unbalanced(rank: int = 4, dtype: torch.dtype = torch.float64) -> LoRALinear:
    """B a hundred times as large as A, and each ill-conditioned in its own directions."""
    A, B = factor(rank, 30, 20.0, 1), 100 * factor(40, rank, 50.0, 2)
    return LoRALinear(A.to(dtype), B.to(dtype), scaling=0.5)


def gradient(model: LoRALinear, step: int = 0) -> None:
    G = torch.randn(40, 30, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    model.backward_from(G)


def imbalance(model: LoRALinear) -> float:
    A, B = model.A.detach(), model.B.detach()
    return oracle.relative_error(A @ A.T, B.T @ B)


def sgd(parameters: Iterable[Parameter]) -> Optimizer:
    return SGD(parameters, lr=1e-3, momentum=0.9)


def adamw(parameters: Iterable[Parameter]) -> Optimizer:
    return AdamW(parameters, lr=1e-3)


def step(model: LoRALinear, optimizer: Optimizer, number: int = 0) -> None:
    gradient(model, number)
    optimizer.step()


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("correction", ["lora", "sds", "sds-split", "scaled", "altlora"])
def test_the_product_stays_and_the_factors_are_balanced(
    correction: str, dtype: torch.dtype, tolerance: float, rank: int
) -> None:
    """Beside the same optimizer without it: after one step both have the same ΔW."""
    plain, model = unbalanced(rank, dtype), unbalanced(rank, dtype)
    step(plain, SDSPreconditioner(adamw(plain.parameters()), plain, correction))
    step(model, SDSPreconditioner(adamw(model.parameters()), model, correction, rebalance_every=1))
    assert oracle.relative_error(model.delta, plain.delta) < tolerance
    assert imbalance(model) < 10 * tolerance
    assert imbalance(plain) > 0.9
    condition = torch.linalg.svdvals(plain.delta)[[0, rank - 1]]
    for balanced in (model.A, model.B):
        torch.testing.assert_close(
            torch.linalg.cond(balanced.detach()), (condition[0] / condition[1]).sqrt(), rtol=1e-3, atol=0
        )


def test_the_schedule() -> None:
    model = unbalanced()
    optimizer = SDSPreconditioner(sgd(model.parameters()), model, "sds", rebalance_every=3)
    balanced: list[int] = []
    for number in range(1, 8):
        with torch.no_grad():  # what a step alone would hardly do
            model.A.mul_(2)
        step(model, optimizer, number)
        if imbalance(model) < 1e-10:
            balanced.append(number)
    assert balanced == [3, 6]
    assert optimizer.param_groups[0]["sdsopt_steps"] == 7


@pytest.mark.parametrize("correction", ["lora", "sds", "sds-split", "scaled"])
def test_moments_are_those_of_the_same_gradients_in_the_new_coordinates(correction: str) -> None:
    """A first step's momentum is the corrected gradient; so it must be the corrected gradient at the new factors."""
    model = unbalanced()
    frozen = SGD(model.parameters(), lr=1e-30, momentum=0.9)  # moves nothing, and yet is a step
    optimizer = SDSPreconditioner(frozen, model, correction, rebalance_every=1, damping=0.0)
    step(model, optimizer)
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in (model.A, model.B)]

    fresh = LoRALinear(model.A.detach(), model.B.detach(), scaling=0.5)
    bare = SDSPreconditioner(SGD(fresh.parameters(), lr=1e-30, momentum=0.9), fresh, correction, damping=0.0)
    step(fresh, bare)
    for found, p in zip(momentum, (fresh.A, fresh.B), strict=True):
        assert oracle.relative_error(found, bare.state[p]["momentum_buffer"]) < 1e-9


def deltas(rebalance_every: int | None, correction: Any, **options: Any) -> list[Tensor]:
    model = lora_linear(40, 30, 4, condition=10.0, dtype=torch.float64)
    optimizer = SDSPreconditioner(
        SGD(model.parameters(), lr=0.02, momentum=0.9),
        model,
        correction,
        damping=0.0,
        rebalance_every=rebalance_every,
        **options,
    )
    found: list[Tensor] = []
    for number in range(6):
        step(model, optimizer, number)
        found.append(model.delta)
    return found


@pytest.mark.parametrize("options", [{}, {"transport": "moments"}], ids=["moments stay", "moments follow"])
def test_scaled_with_momentum_does_not_notice_it(options: dict[str, str]) -> None:
    """Its steps of the product are the same in every gauge, if its momentum is carried from one to the other."""
    for one, other in zip(deltas(None, "scaled", **options), deltas(2, "scaled", **options), strict=True):
        assert oracle.relative_error(other, one) < 1e-11


def test_lora_does_notice_it() -> None:
    """So the test above can fail."""
    one, other = deltas(None, "lora")[-1], deltas(2, "lora")[-1]
    assert oracle.relative_error(other, one) > 1e-4


def test_a_product_of_lower_rank_stays_as_it_is() -> None:
    plain, model = unbalanced(), unbalanced()
    for net in (plain, model):
        with torch.no_grad():
            net.B[:, 1] = 0
            net.A[1] = 0
    optimizers = [
        SDSPreconditioner(adamw(plain.parameters()), plain, "sds"),
        SDSPreconditioner(adamw(model.parameters()), model, "sds", rebalance_every=1),
    ]
    for net, optimizer in zip((plain, model), optimizers, strict=True):
        step(net, optimizer)
    assert torch.equal(plain.A, model.A)
    assert torch.equal(plain.B, model.B)
    for p, q in ((plain.A, model.A), (plain.B, model.B)):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizers[0].state[p][key], optimizers[1].state[q][key])


def test_only_pairs_that_are_trained_whole() -> None:
    model, plain = Network(), Network()
    for net in (model, plain):
        net.first.A.requires_grad_(False)
    kept = SDSPreconditioner(sgd(p for p in model.parameters() if p.requires_grad), model, rebalance_every=1)
    without = SDSPreconditioner(sgd(p for p in plain.parameters() if p.requires_grad), plain)
    train(model, kept, 1)
    train(plain, without, 1)
    assert torch.equal(model.first.A, plain.first.A)
    assert torch.equal(model.first.B, plain.first.B)
    assert not torch.equal(model.second.A, plain.second.A)


@pytest.mark.parametrize("name", ["llama", "gemma", "vit", "qwen3_moe"])
def test_models_compute_the_same_with_the_new_factors(name: str) -> None:
    """Linear layers, embeddings, convolutions and stacked experts, with one step of AdamW before."""
    model, batch = MODELS[name]()
    plain = copy.deepcopy(model)
    outputs: list[Tensor] = []
    for net, every in ((plain, None), (model, 1)):
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = SDSPreconditioner(AdamW(trained, lr=1e-3), net, "sds", rebalance_every=every)
        net(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            outputs.append(net.eval()(**batch).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    changed = [
        not torch.allclose(a.A, b.A, rtol=1e-2) for a, b in zip(find_pairs(model), find_pairs(plain), strict=True)
    ]
    assert changed
    assert sum(changed) > len(changed) / 2
    for pair in find_pairs(model):
        A, B = (view.double() for view in (pair.split_A(pair.A.detach()), pair.split_B(pair.B.detach())))
        assert oracle.relative_error(A @ A.mT, B.mT @ B) < 1e-4


def test_with_the_split_form_factors_stay_as_well_conditioned_as_their_product() -> None:
    """On its own the form lets κ(A) and κ(B) drift apart."""
    products: dict[int | None, float] = {}
    for every in (None, 1):
        model = unbalanced()
        split = GramPower(0.5, 0.5, max_update_ratio=None)
        optimizer = SDSPreconditioner(adamw(model.parameters()), model, split, rebalance_every=every)
        for number in range(20):
            step(model, optimizer, number)
        products[every] = float(torch.linalg.cond(model.A.detach()) * torch.linalg.cond(model.B.detach()))
        values = torch.linalg.svdvals(model.delta)
        if every:
            assert products[every] == pytest.approx(float(values[0] / values[3]), rel=1e-6)
    assert products[1] < products[None]
