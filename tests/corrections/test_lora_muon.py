"""LoRA-Muon against its algorithm, with momentum, and against its geometry."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import oracle
from inner_optimizers import ALL
from sdsopt import SDSPreconditioner
from sdsopt.corrections.lora_muon import LoRAMuon
from sdsopt.errors import UnsupportedOptimizerError
from toy import LoRALinear, lora_linear

SCALING, LR = 2.0, 0.05


def gradient(rows: int, columns: int, seed: int = 7) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(model: LoRALinear, G: Tensor, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
    """δA and δB of one step."""
    before = [parameter.detach().clone().double() for parameter in (model.A, model.B)]
    model.backward_from(G)
    optimizer.step()
    return model.A.detach().double() - before[0], model.B.detach().double() - before[1]


def wrapped(model: LoRALinear, damping: float = 0.0, **options: Any) -> SDSPreconditioner:
    inner = SGD(model.parameters(), **{"lr": LR, "momentum": 0.9, **options})
    return SDSPreconditioner(inner, model, LoRAMuon(damping), damping=1e-6)


@pytest.mark.parametrize("condition", [2.0, 1e3, 1e6])
@pytest.mark.parametrize("rank", [1, 2, 7, 32, 128])
def test_the_algorithm(rank: int, condition: float) -> None:
    model = lora_linear(200, 180, rank, condition=condition, scaling=SCALING, dtype=torch.float64)
    optimizer = wrapped(model)
    momentum_A, momentum_B = torch.zeros_like(model.A), torch.zeros_like(model.B)
    for seed in range(2):
        A, B, G = model.A.detach().clone(), model.B.detach().clone(), gradient(200, 180, seed)
        found = step(model, G, optimizer)
        assert model.A.grad is not None and model.B.grad is not None
        momentum_A, momentum_B = 0.9 * momentum_A + model.A.grad, 0.9 * momentum_B + model.B.grad
        expected = oracle.muon_step(A, B, momentum_A, momentum_B, SCALING, LR, damping=1e-6)
        for one, other in zip(found, expected, strict=True):
            assert oracle.relative_error(one, other) < 1e-9


def test_float32() -> None:
    model = lora_linear(60, 50, 8, scaling=SCALING)
    A, B, G = model.A.detach().clone(), model.B.detach().clone(), gradient(60, 50)
    found = step(model, G, wrapped(model, 1e-6))
    assert model.A.grad is not None and model.B.grad is not None
    expected = oracle.muon_step(A, B, model.A.grad, model.B.grad, SCALING, LR, damping=1e-6)
    for one, other in zip(found, expected, strict=True):
        assert oracle.relative_error(one, other) < 1e-5


INNERS = {
    "sgd": SGD,
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "adamw": partial(AdamW, weight_decay=0.0),
}


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_both_parts_of_the_products_step_have_half_the_spectral_norm(inner: Callable[..., Optimizer]) -> None:
    model = lora_linear(30, 25, 6, condition=50.0, scaling=SCALING, dtype=torch.float64)
    optimizer = SDSPreconditioner(inner(model.parameters(), lr=LR), model, LoRAMuon(0.0), damping=0.0)
    for seed, rate in enumerate((LR, LR, LR / 10)):  # the third as after a scheduler
        optimizer.param_groups[0]["lr"] = rate
        A, B = model.A.detach().clone(), model.B.detach().clone()
        delta_A, delta_B = step(model, gradient(30, 25, seed), optimizer)
        for part in (SCALING * B @ delta_A, SCALING * delta_B @ A):
            assert torch.linalg.matrix_norm(part, 2).item() == pytest.approx(rate / 2, rel=1e-6)


def test_the_first_step_is_spectral_descent_on_the_tangent_space() -> None:
    """−η/2·(Q_B·msign(Q_Bᵀ·G) + msign(G·Q_A)·Q_Aᵀ) with any orthonormal bases; by QR here."""
    model = lora_linear(30, 25, 6, condition=50.0, scaling=SCALING, dtype=torch.float64)
    A, B, G = model.A.detach().clone(), model.B.detach().clone(), gradient(30, 25)
    delta_A, delta_B = step(model, G, SDSPreconditioner(SGD(model.parameters(), LR), model, LoRAMuon(0.0), damping=0.0))
    Q_B, Q_A = torch.linalg.qr(B).Q, torch.linalg.qr(A.T).Q
    expected = -LR / 2 * (Q_B @ oracle.polar(Q_B.T @ G) + oracle.polar(G @ Q_A) @ Q_A.T)
    assert oracle.relative_error(SCALING * (B @ delta_A + delta_B @ A), expected) < 1e-8


def test_from_zero_B() -> None:
    model = lora_linear(30, 25, 6, scaling=SCALING, dtype=torch.float64)
    model = LoRALinear(model.A.detach(), torch.zeros_like(model.B), SCALING)
    start, optimizer = model.A.detach().clone(), wrapped(model)
    step(model, gradient(30, 25), optimizer)
    assert torch.equal(model.A.detach(), start)
    assert torch.linalg.matrix_norm(model.delta, 2).item() == pytest.approx(LR / 2)
    for seed in range(5):
        step(model, gradient(30, 25, seed), optimizer)
        assert model.A.norm() < 10 * start.norm()


@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_weight_decay_stays_the_inner_optimizers(dtype: torch.dtype, implementation: dict[str, bool]) -> None:
    """And its rounding is not taken for a step where the gradient is zero, as A's is from B = 0."""
    model = lora_linear(60, 50, 8, dtype=dtype)
    start = [parameter.detach().clone() for parameter in (model.A, model.B)]
    inner = AdamW(model.parameters(), lr=LR, weight_decay=0.37, **implementation)
    model.A.grad, model.B.grad = torch.zeros_like(model.A), torch.zeros_like(model.B)
    SDSPreconditioner(inner, model, "lora-muon").step()
    for parameter, before in zip((model.A, model.B), start, strict=True):
        expected = before * (1 - 0.37 * LR)
        torch.testing.assert_close(parameter.detach(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_learning_rate_may_be_a_tensor() -> None:
    models = [lora_linear(dtype=torch.float64) for _ in range(2)]
    for model, lr in zip(models, (LR, torch.tensor(LR, dtype=torch.float64)), strict=True):
        step(model, gradient(12, 10), SDSPreconditioner(AdamW(model.parameters(), lr=lr), model, "lora-muon"))
    torch.testing.assert_close(models[0].B, models[1].B)


def test_the_factors_may_have_different_rates() -> None:
    model = lora_linear(dtype=torch.float64)
    A, B = model.A.detach().clone(), model.B.detach().clone()
    inner = SGD([{"params": [model.A], "lr": LR}, {"params": [model.B], "lr": 16 * LR}])
    delta_A, delta_B = step(model, gradient(12, 10), SDSPreconditioner(inner, model, LoRAMuon(0.0), damping=0.0))
    assert torch.linalg.matrix_norm(B @ delta_A, 2).item() == pytest.approx(LR / 2)
    assert torch.linalg.matrix_norm(delta_B @ A, 2).item() == pytest.approx(8 * LR)


def test_optimizers_without_a_learning_rate_are_refused() -> None:
    [row] = [row for row in ALL if row.name == "torch_optimizer.Adafactor-relative"]
    model = lora_linear()
    with pytest.raises(UnsupportedOptimizerError, match=r"LoRAMuon.*Adafactor has no \"lr\""):
        SDSPreconditioner(row(model.parameters()), model, "lora-muon")
    SDSPreconditioner(row(model.parameters()), model, "sds-split")
    optimizer = wrapped(model)
    with pytest.raises(UnsupportedOptimizerError, match=r"SGD has no \"lr\""):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, 2))], "lr": None})


def test_bad_damping() -> None:
    for damping in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be"):
            LoRAMuon(damping)
