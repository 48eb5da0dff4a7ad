"""RefLoRA against plain LoRA from balanced factors, which the SVD of the product gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from recorder import corrected_gradients
from sdsopt import attach
from toy import LoRALinear, factor, lora_linear

ROWS, COLUMNS, SCALING = 150, 140, 0.5


def gradient() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def product_gradient(model: LoRALinear, damping: float) -> Tensor:
    """s·(B·gA' + gB'·A)."""
    seen = corrected_gradients(model, "reflora", damping)
    A, B = model.A.detach().double(), model.B.detach().double()
    return SCALING * (B @ seen[model.A].double() + seen[model.B].double() @ A)


def from_balanced_factors(model: LoRALinear, G: Tensor, rank: int) -> Tensor:
    """With B·A = U·Σ·Vᵀ, the balanced factors U·Σ^(1/2) and Σ^(1/2)·Vᵀ; then plain LoRA: s²·(B·Bᵀ·G + G·Aᵀ·A)."""
    U, sigma, V = torch.linalg.svd(model.B.detach().double() @ model.A.detach().double())
    U, sigma, V = U[:, :rank], sigma[:rank], V[:rank]
    return SCALING**2 * ((U * sigma) @ U.T @ G + G @ V.T @ (sigma[:, None] * V))


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7, 32, 128])
def test_it_is_plain_lora_from_balanced_factors(rank: int, dtype: torch.dtype, condition: float) -> None:
    model = lora_linear(ROWS, COLUMNS, rank, condition=condition, scaling=SCALING, dtype=dtype)
    G = gradient()
    model.backward_from(G)
    expected = from_balanced_factors(model, G, rank)
    # Rounding adds up over the rank. A gradient is rounded before S⁻¹ amplifies what is small in it.
    precision = max(torch.finfo(dtype).eps, rank**0.5 * torch.finfo(torch.float64).eps)
    tolerance = 4 * condition * precision + 1e-16 * condition**3
    assert oracle.relative_error(product_gradient(model, damping=0.0), expected) < tolerance


@pytest.mark.parametrize("damping", [0.0, 1e-6])
@pytest.mark.parametrize("conditions", [(1.0, 1e6), (1e6, 1.0), (1e6, 1e6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_finite_where_the_reference_is_not(dtype: torch.dtype, conditions: tuple[float, float], damping: float) -> None:
    """Its square root of a slightly negative eigenvalue is NaN from a condition number of 1e4 on."""
    A, B = factor(16, COLUMNS, conditions[0], seed=1), factor(ROWS, 16, conditions[1], seed=2)
    model = LoRALinear(A.to(dtype), B.to(dtype), SCALING)
    model.backward_from(gradient())
    seen = corrected_gradients(model, "reflora", damping)
    assert all(tensor.isfinite().all() for tensor in seen.values())
    found, G = product_gradient(model, damping), gradient()
    assert (found * G).sum() > 0  # and still a descent direction
    # What the weak directions add is below the strong ones' rounding.
    assert oracle.relative_error(found, from_balanced_factors(model, G, 16)) < 1e-2


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_S_solves_its_equation(damping: float) -> None:
    """With unit matrices as gradients, the corrected ones are S⁻¹ and S."""
    rank = 5
    model = lora_linear(rank, rank, rank, condition=20.0, dtype=torch.float64)
    model.A.grad = model.B.grad = torch.eye(rank, dtype=torch.float64)
    seen = corrected_gradients(model, "reflora", damping)
    inverse, S = seen[model.A], seen[model.B]
    M_A, M_B = (oracle.inverse_root(X, -1, damping) for X in (model.A.detach().T, model.B.detach()))
    assert oracle.relative_error(S @ M_A @ S, M_B) < 1e-10
    torch.testing.assert_close(S @ inverse, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(S, S.T)
    assert torch.linalg.eigvalsh(S).min() > 0


def test_a_zero_factor_counts_as_orthonormal() -> None:
    """So the first step from LoRA's start is that of sds."""
    model = lora_linear(dtype=torch.float64)
    model = LoRALinear(model.A.detach(), torch.zeros_like(model.B))
    model.backward_from(torch.ones(12, 10, dtype=torch.float64))
    seen, sds = (corrected_gradients(model, name) for name in ("reflora", "sds"))
    torch.testing.assert_close(seen[model.B], sds[model.B])
    assert not seen[model.A].any()


def test_hooks_do_the_same() -> None:
    model = lora_linear(scaling=2.0)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    wrapped = corrected_gradients(model, "reflora")
    model.zero_grad()
    with attach(model, "reflora"):
        for part in x.split(2):
            model(part).square().sum().backward()
    for parameter, seen in wrapped.items():
        torch.testing.assert_close(parameter.grad, seen)
