"""Moments in the basis of the next step, against least squares in the space of W."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

import oracle
from sdsopt import Factors, GramPower, KeepNorm, SDSPreconditioner, TrackBasis
from sdsopt.corrections import basis_change
from toy import LoRALinear, factor, lora_linear

ROWS, COLUMNS, RANK, S = 9, 7, 3, 0.7
EXPONENTS = [0.0, 0.25, 0.5, 1.0]


def basis(tall: Tensor, exponent: float) -> Tensor:
    """X·(XᵀX)^(-p), for X (d, r)."""
    return tall @ oracle.inverse_root(tall, exponent, 0.0)


def carried_in_full_space(moment: Tensor, old: Tensor, new: Tensor, exponent: float) -> Tensor:
    """Z_newᵀ·Ḡ for the smallest Ḡ with Z_oldᵀ·Ḡ = moment: what past gradients of W would look like in the new basis."""
    smallest = torch.linalg.lstsq(basis(old, exponent).T, moment, driver="gelsd").solution
    return basis(new, exponent).T @ smallest


def two_steps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A and B before and after a large move."""
    A, B = factor(RANK, COLUMNS, 5.0, 1), factor(ROWS, RANK, 8.0, 2)
    return A, B, A + 0.3 * factor(RANK, COLUMNS, 2.0, 3), B + 0.3 * factor(ROWS, RANK, 2.0, 4)


def factors(A: Tensor, B: Tensor) -> Factors:
    powers = [*EXPONENTS, 0.75]
    return Factors(
        stored_A=A[None],
        stored_B=B[None],
        scaling=S,
        dtype=torch.float64,
        roots_A={p: oracle.inverse_root(A.T, p, 0.0)[None] for p in powers if p},
        roots_B={p: oracle.inverse_root(B, p, 0.0)[None] for p in powers if p},
    )


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_first_moments(exponent: float) -> None:
    A, B, new_A, new_B = two_steps()
    T, R = basis_change(factors(A, B), factors(new_A, new_B), exponent)
    m_A, m_B = factor(RANK, COLUMNS, 3.0, 5), factor(ROWS, RANK, 3.0, 6)
    torch.testing.assert_close(T[0] @ m_A, carried_in_full_space(m_A, B, new_B, exponent))
    torch.testing.assert_close(m_B @ R[0], carried_in_full_space(m_B.T, A.T, new_A.T, exponent).T)


def test_with_orthonormal_bases_it_is_the_product_of_the_polar_factors() -> None:
    A, B, new_A, new_B = two_steps()
    T, R = basis_change(factors(A, B), factors(new_A, new_B), 0.5)
    torch.testing.assert_close(T[0], oracle.polar(new_B).T @ oracle.polar(B))
    torch.testing.assert_close(R[0], oracle.polar(A) @ oracle.polar(new_A).T)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_a_resting_partner_changes_nothing_whatever_the_damping(exponent: float) -> None:
    A, B, new_A, _ = two_steps()
    old = factors(A, B)
    damped = Factors(**{**vars(factors(new_A, B)), "roots_B": {p: 0.9 * root for p, root in old.roots_B.items()}})
    T, R = basis_change(old, damped, exponent)
    assert torch.equal(T[0], torch.eye(RANK, dtype=torch.float64))
    assert not torch.allclose(R[0], torch.eye(RANK, dtype=torch.float64), atol=1e-2)


def test_second_moments_are_those_of_the_carried_gradients() -> None:
    """Over gradients ±√v with all combinations of signs, coordinates are uncorrelated and their squares average to v.

    The transposed squares, as in LoFT's published code, are another thing.
    """
    A, B, new_A, new_B = two_steps()
    T, R = (matrix[0] for matrix in basis_change(factors(A, B), factors(new_A, new_B), 0.5))
    v_A = factor(RANK, COLUMNS, 3.0, 5).square()
    v_B = factor(ROWS, RANK, 3.0, 6).square()
    signs = [torch.tensor(s, dtype=torch.float64) for s in product((-1.0, 1.0), repeat=RANK)]
    wanted_A = torch.stack([(T @ (s[:, None] * v_A.sqrt())).square() for s in signs]).mean(0)
    wanted_B = torch.stack([((v_B.sqrt() * s) @ R).square() for s in signs]).mean(0)
    torch.testing.assert_close(T.square() @ v_A, wanted_A)
    torch.testing.assert_close(v_B @ R.square(), wanted_B)
    assert not torch.allclose(T.square().T @ v_A, wanted_A, rtol=0.1)
    assert not torch.allclose(v_B @ R.square().T, wanted_B, rtol=0.1)


def gradient(step: int) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def start() -> LoRALinear:
    return lora_linear(ROWS, COLUMNS, RANK, condition=6.0, scaling=S, dtype=torch.float64)


def run(
    make: Callable[[Iterable[Parameter]], Optimizer], correction: Any, steps: int = 4, **options: Any
) -> LoRALinear:
    model = start()
    optimizer = SDSPreconditioner(make(model.parameters()), model, correction, damping=0.0, **options)
    for step in range(steps):
        model.backward_from(gradient(step))
        optimizer.step()
    return model


def adam_direction(state: dict[str, Tensor], g: Tensor, step: int) -> Tensor:
    state["m"] = 0.9 * state["m"] + 0.1 * g
    state["v"] = 0.999 * state["v"] + 0.001 * g.square()
    denominator = (state["v"] / (1 - 0.999**step)).sqrt() + 1e-8
    return state["m"] / (1 - 0.9**step) / denominator


def sgd_direction(state: dict[str, Tensor], g: Tensor, step: int) -> Tensor:
    state["m"] = 0.9 * state["m"] + g
    return state["m"]


def by_hand(direction: Callable[..., Tensor], lr: float, p: float, q: float, steps: int = 4) -> tuple[Tensor, Tensor]:
    """The whole method, written once more: factors as tall matrices, Bᵀ and A seen from each other's side."""
    model = start()
    A, B = model.A.detach().clone(), model.B.detach().clone()
    states = [{"m": torch.zeros_like(t), "v": torch.zeros_like(t)} for t in (A, B.T)]
    for step in range(steps):
        G = gradient(step)
        move_A = -lr * direction(states[0], S * basis(B, p).T @ G, step + 1)
        move_B = -lr * direction(states[1], S * basis(A.T, p).T @ G.T, step + 1).T
        old_A, old_B = A, B
        A = A + oracle.inverse_root(old_B, q, 0.0) @ move_A
        B = B + move_B @ oracle.inverse_root(old_A.T, q, 0.0)
        for state, old, new in ((states[0], old_B, B), (states[1], old_A.T, A.T)):
            one = torch.eye(RANK, dtype=torch.float64)
            T = carried_in_full_space(one, old, new, p)
            state["m"] = carried_in_full_space(state["m"], old, new, p)
            state["v"] = T.square() @ state["v"]
    return A, B


FORMS = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (1.0, 0.0)]


@pytest.mark.parametrize(("p", "q"), FORMS)
@pytest.mark.parametrize(
    ("make", "direction", "lr"),
    [
        (lambda ps: SGD(ps, lr=0.05, momentum=0.9), sgd_direction, 0.05),
        (lambda ps: Adam(ps, lr=0.05), adam_direction, 0.05),
        (lambda ps: AdamW(ps, lr=0.05, weight_decay=0.0, amsgrad=False, foreach=True), adam_direction, 0.05),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_runs_against_the_method_written_by_hand(make: Any, direction: Any, lr: float, p: float, q: float) -> None:
    correction = GramPower(p, q, max_update_ratio=None)
    model, still = run(make, correction, transport="moments"), run(make, correction)
    A, B = by_hand(direction, lr, p, q)
    torch.testing.assert_close(model.A.detach(), A, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.B.detach(), B, rtol=1e-9, atol=1e-10)
    assert (still.A - A).abs().max() > 1e-3  # without transport it is another run


def lion(parameters: Any) -> Optimizer:
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    return pytorch_optimizer.Lion(parameters, lr=0.01)


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda ps: NAdam(ps, lr=0.01), {"exp_avg": 1, "exp_avg_sq": 2}),
        (lambda ps: RAdam(ps, lr=0.01), {"exp_avg": 1, "exp_avg_sq": 2}),
        (lambda ps: Adam(ps, lr=0.01, amsgrad=True), {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}),
        (lambda ps: AdamW(ps, lr=0.01, fused=True), {"exp_avg": 1, "exp_avg_sq": 2}),
        (lambda ps: SGD(ps, lr=0.01, momentum=0.9, nesterov=True), {"momentum_buffer": 1}),
        (lambda ps: torch.optim.Muon(ps, lr=0.01), {"momentum_buffer": 1}),
        (lion, {"exp_avg": 1}),
    ],
    ids=["nadam", "radam", "amsgrad", "fused adamw", "nesterov", "muon", "lion"],
)
def test_every_moment_of_every_known_optimizer(make: Any, keys: dict[str, int]) -> None:
    """One step with transport leaves the moments of one without, times the change of basis and its squares."""
    plain, model = start(), start()
    old = factors(model.A.detach().clone(), model.B.detach().clone())
    optimizers = [
        SDSPreconditioner(make(plain.parameters()), plain, "sds", damping=0.0),
        SDSPreconditioner(make(model.parameters()), model, "sds", damping=0.0, transport="moments"),
    ]
    for net, optimizer in zip((plain, model), optimizers, strict=True):
        net.backward_from(gradient(0))
        optimizer.step()
    T, R = (matrix[0] for matrix in basis_change(old, factors(model.A.detach(), model.B.detach()), 0.5))
    state_A, state_B = (optimizers[1].state[p] for p in (model.A, model.B))
    of_shape = {key for key, value in state_A.items() if torch.is_tensor(value) and value.shape == model.A.shape}
    assert of_shape == set(keys)
    for key, power in keys.items():
        before_A, before_B = (optimizers[0].state[p][key] for p in (plain.A, plain.B))
        torch.testing.assert_close(state_A[key], T**power @ before_A, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state_B[key], before_B @ R**power, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(state_A[key], before_A, rtol=1e-4)


def test_norms_kept_by_rescale_change_nothing_about_the_basis() -> None:
    correction = TrackBasis(KeepNorm(GramPower(0.5)))
    assert correction.basis_exponent == 0.5
    assert correction.gram_exponents == (0.5,)
    model = run(lambda ps: SGD(ps, lr=0.05, momentum=0.9), "sds", rescale="grad_norm", transport="moments")
    other = run(lambda ps: SGD(ps, lr=0.05, momentum=0.9), correction)
    assert torch.equal(model.A, other.A)


def test_from_B_equal_to_zero() -> None:
    """LoRA's start: nothing was learnt about A yet, and nothing is carried."""
    model = start()
    with torch.no_grad():
        model.B.zero_()
    optimizer = SDSPreconditioner(AdamW(model.parameters(), lr=0.01), model, "sds-split", transport="moments")
    for step in range(3):
        model.backward_from(gradient(step))
        optimizer.step()
        assert all(t.isfinite().all() for p in model.parameters() for t in (p, *optimizer.state[p].values()))
    assert optimizer.state[model.A]["exp_avg"].any()
