"""B·Q and Q⁻¹·A are the same adapter: what a correction makes of it must not depend on Q."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from sdsopt import GramPower, SDSPreconditioner, available_corrections
from toy import LoRALinear, factor, lora_linear

ROWS, COLUMNS, RANK = 14, 11, 4


def product_step(model: LoRALinear, G: Tensor, correction: str | GramPower, lr: float = 1e-3) -> Tensor:
    """How far one step of SGD moves ΔW."""
    before = model.delta
    optimizer = SDSPreconditioner(torch.optim.SGD(model.parameters(), lr=lr), model, correction, damping=0.0)
    model.backward_from(G)
    optimizer.step()
    return model.delta - before


def gradient() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def models(Q: Tensor, inverse: Tensor) -> tuple[LoRALinear, LoRALinear]:
    model = lora_linear(ROWS, COLUMNS, RANK, condition=20.0, dtype=torch.float64, scaling=1.5)
    return model, LoRALinear(inverse @ model.A.detach(), model.B.detach() @ Q, 1.5)


@pytest.mark.parametrize("correction", [*available_corrections(), GramPower(0.25)])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_orthogonal_change_of_basis(correction: str | GramPower, seed: int) -> None:
    Q = torch.linalg.qr(factor(RANK, RANK, seed=seed)).Q
    model, turned = models(Q, Q.T)
    step, turned_step = (product_step(m, gradient(), correction) for m in (model, turned))
    assert oracle.relative_error(turned_step, step) < 1e-9


# The start policy measures lengths in the present basis, so it is off here.
@pytest.mark.parametrize("correction", [GramPower(1.0), GramPower(0.5, 0.5, max_update_ratio=None)])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), condition=st.sampled_from([2.0, 30.0]))
def test_any_invertible_change_of_basis(correction: GramPower, seed: int, condition: float) -> None:
    Q = factor(RANK, RANK, condition, seed)
    model, stretched = models(Q, torch.linalg.inv(Q))
    step, stretched_step = (product_step(m, gradient(), correction) for m in (model, stretched))
    assert oracle.relative_error(stretched_step, step) < 1e-8


def test_plain_lora_depends_on_the_basis() -> None:
    """Else the tests above would show nothing."""
    Q = factor(RANK, RANK, 30.0)
    model, stretched = models(Q, torch.linalg.inv(Q))
    step, stretched_step = (product_step(m, gradient(), "lora") for m in (model, stretched))
    assert oracle.relative_error(stretched_step, step) > 0.5


@pytest.mark.parametrize("shape", [(5, 4, 1), (14, 11, 4), (40, 50, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sds_split_with_sgd_is_scaled_with_sgd(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    G = torch.randn(*shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    steps = [
        product_step(lora_linear(*shape, condition=20.0, dtype=dtype), G, correction, lr=1e-4).double()
        for correction in ("sds-split", "scaled")
    ]
    # The step is the difference of two stored products, so its error is that of the products.
    size = lora_linear(*shape, condition=20.0).delta.norm() / steps[1].norm()
    assert oracle.relative_error(*steps) < 10 * torch.finfo(dtype).eps * (1 + size.item())
