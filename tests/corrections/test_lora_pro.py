"""LoRA-Pro against its closed form, and against the least-squares problem that it solves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
from recorder import corrected_gradients
from toy import LoRALinear, lora_linear

ROWS, COLUMNS = 150, 140


def gradient(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def raw(model: LoRALinear) -> tuple[Tensor, Tensor]:
    assert model.A.grad is not None and model.B.grad is not None
    return model.A.grad, model.B.grad


@pytest.mark.parametrize("condition", [2.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 7, 32, 128])
def test_the_closed_form(rank: int, dtype: torch.dtype, condition: float) -> None:
    model = lora_linear(ROWS, COLUMNS, rank, condition=condition, scaling=2.0, dtype=dtype)
    model.backward_from(gradient(ROWS, COLUMNS))
    seen = corrected_gradients(model, "lora-pro")
    expected = oracle.lora_pro(model.A.detach(), model.B.detach(), *raw(model), 2.0, damping=1e-6)
    for found, wanted in zip((seen[model.A], seen[model.B]), expected, strict=True):
        assert oracle.relative_error(found, wanted) < torch.finfo(dtype).eps + 1e-8


@pytest.mark.parametrize("condition", [2.0, 30.0])
def test_it_solves_the_least_squares_problem(condition: float) -> None:
    """Of all minimisers of ‖s·B·gA' + s·gB'·A − G‖, the one closest to the raw gradients; by the pseudo-inverse."""
    rows, columns, rank, s = 9, 8, 3, 0.7
    model = lora_linear(rows, columns, rank, condition=condition, scaling=s, dtype=torch.float64)
    G = gradient(rows, columns)
    model.backward_from(G)
    A, B = model.A.detach(), model.B.detach()
    jacobian = s * torch.cat(  # (m·n, r·n + m·r), of vec(gA') and vec(gB')
        [torch.kron(B, torch.eye(columns)), torch.kron(torch.eye(rows), A.T.contiguous())], dim=1
    )
    start = torch.cat([g.flatten() for g in raw(model)])
    closest = start + torch.linalg.pinv(jacobian, rtol=1e-12) @ (G.flatten() - jacobian @ start)

    seen = corrected_gradients(model, "lora-pro", damping=0.0)
    found = torch.cat([seen[model.A].flatten(), seen[model.B].flatten()])
    assert oracle.relative_error(found, closest) < 1e-10
    assert oracle.relative_error(start, closest) > 0.1

    U, V = oracle.polar(B), oracle.polar(A)  # orthonormal bases
    projected = U @ U.T @ G + (G - U @ U.T @ G) @ V.T @ V
    assert oracle.relative_error((jacobian @ found).reshape(rows, columns), projected) < 1e-11


def test_no_matrix_of_out_by_out_is_formed() -> None:
    """It would take 720 GB."""
    model = lora_linear(300_000, 3, 2, dtype=torch.float32)
    model.backward_from(gradient(300_000, 3))
    seen = corrected_gradients(model, "lora-pro")
    assert seen[model.B].isfinite().all()


def test_from_zero_B() -> None:
    """The paper's first step."""
    model = lora_linear(scaling=2.0, dtype=torch.float64)
    model = LoRALinear(model.A.detach(), torch.zeros_like(model.B), 2.0)
    model.backward_from(gradient(12, 10))
    seen = corrected_gradients(model, "lora-pro")
    assert not seen[model.A].any()
    _, expected = oracle.corrected(model.A.detach(), model.B.detach(), *raw(model), 1, 1e-6)
    assert oracle.relative_error(seen[model.B], expected / 4) < 1e-12


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_one_factor_alone_is_the_minimiser_for_it(frozen: str) -> None:
    model = lora_linear(scaling=2.0, dtype=torch.float64)
    G = gradient(12, 10)
    model.backward_from(G)
    still, moving = (model.A, model.B) if frozen == "A" else (model.B, model.A)
    still.requires_grad_(False)
    still.grad = None
    seen = corrected_gradients(model, "lora-pro", damping=0.0)
    assert seen.keys() == {moving}
    A, B = 2 * model.A.detach(), 2 * model.B.detach()
    expected = torch.linalg.lstsq(A.T, G.T).solution.T if frozen == "A" else torch.linalg.lstsq(B, G).solution
    assert oracle.relative_error(seen[moving], expected) < 1e-12
