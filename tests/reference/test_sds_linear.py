"""The paper's layer against its formulas, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import oracle
from sdsopt.reference import SDSLinear
from toy import factor

S = 0.7


def layer(rows: int = 9, columns: int = 7, rank: int = 3, *, split: bool = True, moved: bool = True) -> SDSLinear:
    """With factors of condition number 10, off the bases where they were `moved`."""
    torch.manual_seed(0)
    base = nn.Linear(columns, rows, dtype=torch.float64)
    A, B = factor(rank, columns, 10.0, seed=1), factor(rows, rank, 10.0, seed=2)
    made = SDSLinear(base, Parameter(A), Parameter(B), S)
    if split:
        made.split()
        if moved:
            step(made, 0.1)
    return made


def step(made: SDSLinear, length: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (made.A, made.B):
            parameter.add_(length * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def expected_delta(made: SDSLinear) -> Tensor:
    A, B = made.A.detach(), made.B.detach()
    return S * (made.Q_B @ A + B @ made.Q_A) if made.is_split else S * B @ A


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("shape", [(5, 7), (2, 4, 7)])
def test_forward_and_gradients(split: bool, shape: tuple[int, ...]) -> None:
    made = layer(split=split)
    base = made.base
    assert isinstance(base, nn.Linear)
    x = torch.randn(shape, dtype=torch.float64)
    y = made(x)
    torch.testing.assert_close(y, x @ (base.weight + expected_delta(made)).T + base.bias, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.delta, expected_delta(made), rtol=1e-12, atol=1e-12)

    upstream = torch.randn_like(y)
    y.backward(upstream)
    G = upstream.flatten(0, -2).T @ x.flatten(0, -2)
    for_A, for_B = (made.Q_B, made.Q_A) if split else (made.B.detach(), made.A.detach())
    torch.testing.assert_close(made.A.grad, S * for_A.T @ G, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.B.grad, S * G @ for_B.T, rtol=1e-12, atol=1e-12)
    assert {name for name, _ in made.named_parameters() if "base" not in name} == {"A", "B"}


def test_gradients_do_not_see_the_singular_values() -> None:
    """With G inside both subspaces its singular values come through as they are, times s; plain LoRA's do not."""
    made, plain = layer(), layer(split=False)
    wanted = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    for which, left, right in ((made, made.Q_B, made.Q_A), (plain, plain.B.detach(), plain.A.detach())):
        G = oracle.polar(left) @ torch.diag(wanted) @ oracle.polar(right)
        (which(torch.eye(7, dtype=torch.float64)).T * G).sum().backward()
    assert made.A.grad is not None and made.B.grad is not None and plain.A.grad is not None
    for gradient in (made.A.grad, made.B.grad):
        torch.testing.assert_close(torch.linalg.svdvals(gradient), S * wanted)
    assert not torch.allclose(torch.linalg.svdvals(plain.A.grad), S * wanted, rtol=0.1)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(9, 7, 3), (4, 12, 4), (6, 6, 1)])
def test_the_split_keeps_the_update_and_halves_its_singular_values(rows: int, columns: int, rank: int) -> None:
    made = layer(rows, columns, rank, split=False)
    before = made.delta
    made.split()
    torch.testing.assert_close(made.delta, before, rtol=1e-12, atol=1e-12)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(made.Q_B.T @ made.Q_B, eye)
    torch.testing.assert_close(made.Q_A @ made.Q_A.T, eye)
    half = torch.diag(torch.linalg.svdvals(before)[:rank] / (2 * S))
    torch.testing.assert_close(made.A.detach(), half @ made.Q_A)
    torch.testing.assert_close(made.B.detach(), made.Q_B @ half)
    with pytest.raises(RuntimeError, match="split already"):
        made.split()


def test_a_refresh_right_after_the_split_changes_nothing() -> None:
    made = layer(moved=False)
    before = made.delta
    made.refresh()
    torch.testing.assert_close(made.delta, before, rtol=1e-12, atol=1e-12)


def test_what_a_refresh_keeps_and_what_it_changes() -> None:
    made = layer()
    A, B, Q_A, Q_B, before = (t.detach().clone() for t in (made.A, made.B, made.Q_A, made.Q_B, made.delta))
    made.refresh()
    assert torch.equal(made.A, A)
    assert torch.equal(made.B, B)
    torch.testing.assert_close(made.Q_B @ made.Q_B.T @ B, B)  # a basis of the factor's subspace
    torch.testing.assert_close(A @ made.Q_A.T @ made.Q_A, A)
    assert ((made.Q_B * Q_B).sum(0) > 0).all()  # no direction turned over
    assert ((made.Q_A * Q_A).sum(1) > 0).all()
    change = S * (made.Q_B - Q_B) @ A + S * B @ (made.Q_A - Q_A)
    torch.testing.assert_close(made.delta, before + change, rtol=1e-12, atol=1e-12)
    assert change.norm() > 0.01 * before.norm()


def test_what_a_step_does_outside_of_the_old_subspace_counts_twice_after_the_refresh() -> None:
    """To first order: the error falls with the square of the step."""
    errors: list[float] = []
    for length in (1e-5, 5e-6):
        made = layer(moved=False)
        outside = torch.eye(9, dtype=torch.float64) - made.Q_B @ made.Q_B.T
        start = made.delta
        step(made, length)
        by_step = outside @ (made.delta - start)
        stepped = made.delta
        made.refresh()
        by_refresh = outside @ (made.delta - stepped)
        errors.append(oracle.relative_error(by_refresh, by_step))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # relative to a step that is halved too


def test_before_the_split_a_refresh_does_nothing() -> None:
    made = layer(split=False)
    before = made.delta
    made.refresh()
    assert torch.equal(made.delta, before)
    assert not made.Q_A.any()


def test_around_a_linear_layer() -> None:
    linear = nn.Linear(7, 9)
    made = SDSLinear.around(linear, rank=4, alpha=8.0)
    x = torch.randn(5, 7)
    assert torch.equal(made(x), linear(x))  # B = 0
    assert made.scaling == 4.0
    assert made.A.any()
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["A", "B"]
    assert "plain LoRA so far" in repr(made)


def test_bfloat16_layers() -> None:
    """The decompositions are computed in float64."""
    made = SDSLinear.around(nn.Linear(7, 9, dtype=torch.bfloat16), rank=2, alpha=2.0)
    nn.init.normal_(made.B)
    before = made.delta
    made.split()
    torch.testing.assert_close(made.delta.float(), before.float(), rtol=0.05, atol=0.05)
    made.refresh()
    assert made(torch.ones(3, 7, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("A", "B"), [((8, 7), (9, 8)), ((3, 7), (9, 2)), ((7, 12), (6, 7))])
def test_ranks_without_a_basis_are_refused(A: tuple[int, int], B: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="one that exceeds neither"):
        SDSLinear(nn.Identity(), Parameter(torch.zeros(A)), Parameter(torch.zeros(B)), 1.0)
