"""The metrics against dense float64 decompositions, their bounds and invariances, and where they are undefined."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from oracle import relative_error
from sdsopt.diagnostics import (
    balance,
    condition_number,
    effective_rank,
    gram_singular_values,
    median_condition_numbers,
    pair_spectra,
    product_norm,
    product_svd,
    singular_values,
    stable_rank,
)
from sdsopt.pairs import find_pairs
from toy import Network, factor

SPECTRUM = [4.0, 2.0, 1.0]


def with_spectrum(values: list[float], rows: int = 7, columns: int = 5) -> Tensor:
    k = len(values)
    left = torch.linalg.qr(torch.randn(rows, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    right = torch.linalg.qr(torch.randn(columns, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


@st.composite
def products(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Batched factors of any shape, condition and scale; also ranks above a side of ΔW."""
    m, n, r, e = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    condition, scale = draw(st.sampled_from([1.0, 10.0, 1e4])), draw(st.sampled_from([1e-6, 1.0, 1e6]))
    A = torch.stack([factor(r, n, condition, seed=i) for i in range(e)])
    B = torch.stack([factor(m, r, condition, seed=10 + i) for i in range(e)])
    return scale * A, B


def test_known_spectrum() -> None:
    values = singular_values(with_spectrum(SPECTRUM))[:3]
    torch.testing.assert_close(values, torch.tensor(SPECTRUM, dtype=torch.float64))
    assert condition_number(values).item() == pytest.approx(4)
    assert stable_rank(values).item() == pytest.approx((16 + 4 + 1) / 16)
    entropy = -sum(p * math.log(p) for p in (4 / 7, 2 / 7, 1 / 7))
    assert effective_rank(values).item() == pytest.approx(math.exp(entropy))


@settings(deadline=None)
@given(products())
def test_a_product_is_decomposed_without_being_formed(pair: tuple[Tensor, Tensor]) -> None:
    A, B = pair
    delta = B @ A  # (e, m, n)
    U, S, Vh = product_svd(A, B)
    k = S.shape[-1]
    assert k == min(A.shape[-1], A.shape[-2], B.shape[-2])
    size = torch.linalg.matrix_norm(A, 2) * torch.linalg.matrix_norm(B, 2)
    assert ((S - torch.linalg.svdvals(delta)[:, :k]).abs().amax(-1) <= 1e-13 * size).all()
    assert relative_error((U * S[:, None, :]) @ Vh[:, :k], delta) < 1e-12
    for basis in (U, Vh.mT):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(basis.shape[-1]).double().expand(len(A), -1, -1))
    torch.testing.assert_close(product_norm(A, B), torch.linalg.matrix_norm(delta))


@settings(deadline=None)
@given(products())
def test_spectra_of_a_pair(pair: tuple[Tensor, Tensor]) -> None:
    A, B = pair
    found = pair_spectra(A, B)
    sizes = [torch.linalg.matrix_norm(factor, 2)[:, None] for factor in pair]
    expected = [torch.linalg.svdvals(matrix) for matrix in (A, B, B @ A)]
    for values, exact, size in zip(found, expected, (*sizes, sizes[0] * sizes[1]), strict=True):
        k = values.shape[-1]
        assert ((values - exact[:, :k]).abs() <= 1e-13 * size).all()
        assert (exact[:, k:] <= 1e-13 * size).all()  # a product has no more than its factors


@settings(deadline=None)
@given(products())
def test_spectra_by_way_of_the_gram_matrix(pair: tuple[Tensor, Tensor]) -> None:
    for tall in (pair[0].mT, pair[1]):
        found, exact = gram_singular_values(tall), singular_values(tall)
        assert found.shape == exact.shape
        assert ((found - exact).abs() <= 1e-7 * exact[..., :1]).all()
        for rank in (stable_rank, effective_rank):
            torch.testing.assert_close(rank(found), rank(exact), rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_spectra_of_one_matrix_and_of_any_batch(batch: tuple[int, ...]) -> None:
    matrices = torch.randn(*batch, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram_singular_values(matrices), singular_values(matrices))


@settings(deadline=None)
@given(products(), st.sampled_from([1e-150, 0.5, 3.0, 1e150]))
def test_bounds_and_invariances(pair: tuple[Tensor, Tensor], scale: float) -> None:
    values = singular_values(pair[0])  # (e, k)
    k = values.shape[-1]
    for metric, most in ((stable_rank, k), (effective_rank, k), (condition_number, math.inf)):
        found = metric(values)
        assert (found >= 1 - 1e-12).all() and (found <= most + 1e-9).all()
        torch.testing.assert_close(metric(scale * values), found)  # of no importance: the size
        torch.testing.assert_close(metric(values[0]), found[0])  # batching
    assert (stable_rank(values) <= effective_rank(values) + 1e-9).all()
    turned = torch.linalg.qr(torch.randn(pair[0].shape[-1], pair[0].shape[-1], dtype=torch.float64)).Q
    torch.testing.assert_close(singular_values(pair[0] @ turned), values)


def test_every_dtype_is_measured_in_float64() -> None:
    A, B = with_spectrum(SPECTRUM).T.to(torch.bfloat16), with_spectrum(SPECTRUM, 6, 5).to(torch.float16)
    assert singular_values(A).dtype == torch.float64
    assert torch.equal(singular_values(A), singular_values(A.double()))
    assert all(part.dtype == torch.float64 for part in product_svd(A[:5], B))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(product_svd(A[:5], B).S, product_svd(A[:5].double(), B.double()).S)


def test_small_differences_keep_their_digits() -> None:
    """The norm of B·A − B'·A' where the two agree to 1e-12: through Gram matrices it would be lost."""
    A, B = factor(4, 20, 100.0, seed=1), factor(30, 4, 100.0, seed=2)
    change = 1e-12 * torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stacked = product_norm(torch.cat([A, A + change]), torch.cat([B, -B], 1))
    assert stacked.item() == pytest.approx(torch.linalg.matrix_norm(B @ change).item(), rel=1e-2)


def test_zero_is_defined() -> None:
    zero, A = torch.zeros(7, 3), torch.ones(3, 5)
    values = product_svd(A, zero).S
    assert torch.equal(values, torch.zeros(3, dtype=torch.float64))
    assert stable_rank(values) == effective_rank(values) == 0
    assert condition_number(values).isnan()
    assert balance(A, zero).isinf() and balance(torch.zeros(3, 5), zero).isnan()
    assert balance(torch.zeros(3, 5), torch.ones(7, 3)) == 0


def test_rank_deficient_is_infinitely_ill_conditioned() -> None:
    B = with_spectrum(SPECTRUM[:2], 7, 3)
    assert condition_number(singular_values(B)).isinf()
    assert condition_number(singular_values(with_spectrum([1.0, 1.0, 1e-12], 7, 3))) == pytest.approx(1e12, rel=1e-3)
    # Fewer rows than the rank: the directions that there are count.
    assert condition_number(singular_values(with_spectrum(SPECTRUM[:2], 2, 6))) == pytest.approx(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_nan_and_leaves_its_neighbours_alone(bad: float) -> None:
    A, B = torch.stack([factor(3, 6)] * 2), torch.stack([factor(5, 3)] * 2)

    def measured() -> list[Tensor]:
        spectra = pair_spectra(A, B)
        values = product_svd(A, B).S, singular_values(B), gram_singular_values(B), spectra.B, spectra.product
        return [*values, balance(A, B), product_norm(A, B)]

    alone = [values[1] for values in measured()]
    B[0, 2, 1] = bad
    for found, expected in zip(measured(), alone, strict=True):
        assert found[0].isnan().all()
        assert torch.equal(found[1], expected)
    for metric in (condition_number, stable_rank, effective_rank):
        found = metric(singular_values(B))
        assert found[0].isnan() and found[1].isfinite()


def test_a_product_out_of_range_is_nan() -> None:
    huge = torch.full((2, 3, 3), 1e200, dtype=torch.float64)
    huge[1] = torch.eye(3)
    assert product_svd(huge, huge).S.isnan().tolist() == [[True] * 3, [False] * 3]
    assert product_norm(huge, huge).isnan().tolist() == [True, False]


def test_medians_over_a_models_pairs() -> None:
    model = Network()
    with torch.no_grad():
        model.second.B.zero_()  # has no condition number
    expected = [
        [torch.linalg.cond(p.double()).item() for p in ps] for ps in ((model.first.A, model.second.A), (model.first.B,))
    ]
    medians = median_condition_numbers(find_pairs(model))
    assert medians[0] == pytest.approx(sum(expected[0]) / 2)
    assert medians[1] == pytest.approx(expected[1][0])
    with torch.no_grad():
        model.first.B.zero_()
    assert median_condition_numbers(find_pairs(model))[1] is None
    for layer in (model.first, model.second):
        layer.A = torch.empty(0)  # as with ZeRO-3
    assert median_condition_numbers(find_pairs(model)) == (None, None)
