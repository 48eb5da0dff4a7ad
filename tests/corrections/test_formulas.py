"""The corrected gradients against their formulas, over shapes, ranks, dtypes and condition numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from recorder import corrected_gradients
from sdsopt import GramPower
from toy import lora_linear

EXPONENTS = {"lora": 0.0, "sds": 0.5, "sds-split": 0.5, "scaled": 1.0}
SHAPES = [(5, 4, 1), (12, 10, 4), (7, 40, 7), (300, 20, 16), (64, 80, 64), (260, 270, 256)]
# Several units in the last place, times what the formula itself multiplies an error of its input by.
ULPS = 4


def gradient(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_sds_passes_G_through_the_polar_factors(rows: int, columns: int, rank: int, dtype: torch.dtype) -> None:
    condition, scaling = 5.0, 2.0
    model = lora_linear(rows, columns, rank, condition=condition, scaling=scaling, dtype=dtype)
    G = gradient(rows, columns).to(dtype)
    model.backward_from(G)
    seen = corrected_gradients(model, "sds", damping=0.0)

    # All is computed in float64, where rounding adds up over the rank, and differently on every processor.
    precision = max(torch.finfo(dtype).eps, rank**0.5 * torch.finfo(torch.float64).eps)
    tolerance = ULPS * condition * precision
    assert oracle.relative_error(seen[model.A], scaling * oracle.polar(model.B.detach()).T @ G.double()) < tolerance
    assert oracle.relative_error(seen[model.B], scaling * G.double() @ oracle.polar(model.A.detach()).T) < tolerance


@pytest.mark.parametrize("correction", EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    rank=st.integers(1, 48),
    damping=st.sampled_from([1e-6, 1e-2]),
)
def test_every_shape(correction: str, dtype: torch.dtype, rows: int, columns: int, rank: int, damping: float) -> None:
    """Also ranks above the matrix's own: there the damping alone bounds the result."""
    model = lora_linear(rows, columns, rank, dtype=dtype, scaling=0.7)
    model.backward_from(gradient(rows, columns))
    A, B = model.A.detach(), model.B.detach()
    assert model.A.grad is not None
    assert model.B.grad is not None
    expected = oracle.corrected(A, B, model.A.grad, model.B.grad, EXPONENTS[correction], damping)

    seen = corrected_gradients(model, correction, damping)
    for found, wanted, parameter in zip((seen[model.A], seen[model.B]), expected, (model.A, model.B), strict=True):
        assert found.dtype == dtype
        assert found.shape == parameter.shape
        assert found.is_contiguous()
        # Where r > d the small eigenvalues are rounding noise over the damping, in this code as in the oracle.
        assert oracle.relative_error(found, wanted) < torch.finfo(dtype).eps + 1e-8


@pytest.mark.parametrize("inverse_root", ["eigh", "svd"])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
@pytest.mark.parametrize(("condition", "tolerance"), [(1.0, 1e-6), (100.0, 1e-6), (1e4, 1e-4)])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-3])
def test_float32_at_high_condition_numbers(
    condition: float, tolerance: float, damping: float, exponent: float, inverse_root: str
) -> None:
    model = lora_linear(200, 150, 16, condition=condition)
    model.backward_from(gradient(200, 150))
    assert model.A.grad is not None
    assert model.B.grad is not None
    A, B = model.A.detach(), model.B.detach()
    expected = oracle.corrected(A, B, model.A.grad, model.B.grad, exponent, damping)
    seen = corrected_gradients(model, GramPower(exponent), damping, inverse_root=inverse_root)
    assert oracle.relative_error(seen[model.A], expected[0]) < tolerance
    assert oracle.relative_error(seen[model.B], expected[1]) < tolerance


def test_autocast_does_not_leak_in() -> None:
    model = lora_linear(30, 20, 8, condition=100.0)
    model.backward_from(gradient(30, 20))
    plain = corrected_gradients(model, "sds")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = corrected_gradients(model, "sds")
    assert all(torch.equal(plain[p], under_autocast[p]) for p in plain)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_a_frozen_factor_still_corrects_its_partner(frozen: str) -> None:
    """LoRA-FA: only the trainable factor has a gradient, and its preconditioner comes from the frozen one."""
    model = lora_linear(scaling=2.0)
    model.backward_from(gradient(12, 10))
    both = corrected_gradients(model, "sds")
    still, other = (model.A, model.B) if frozen == "A" else (model.B, model.A)
    still.requires_grad_(False)
    still.grad = None
    seen = corrected_gradients(model, "sds")
    assert set(seen) == {other}
    assert torch.equal(seen[other], both[other])
