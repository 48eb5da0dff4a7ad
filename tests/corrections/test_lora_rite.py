"""LoRA-RITE: the split transform with moment transport, and the r×r second moment with its escaped mass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, AdamW, Optimizer

import oracle
from recorder import corrected_gradients
from sdsopt import GramPower, KeepNorm, MatrixMoment, SDSPreconditioner, TrackBasis
from sdsopt.corrections import make_correction
from sdsopt.errors import UnsupportedCorrectionError
from toy import LoRALinear, Network, assert_same, factor, lora_linear, train

ROWS, COLUMNS, RANK, S, RATE = 14, 11, 4, 1.5, 0.02
UNLIMITED = MatrixMoment(GramPower(0.5, 0.5, max_update_ratio=None), beta=0.9, damping=0.0)


def gradient(step: int, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def start(dtype: torch.dtype = torch.float64) -> LoRALinear:
    return lora_linear(ROWS, COLUMNS, RANK, condition=20.0, scaling=S, dtype=dtype)


def run(model: LoRALinear, optimizer: Optimizer, steps: int = 12, first: int = 0) -> LoRALinear:
    for step in range(first, first + steps):
        model.backward_from(gradient(step))
        optimizer.step()
    return model


class Average(SGD):
    """Steps along the bias-corrected average of the gradients, as Adam's momentum is."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore
        for group in self.param_groups:
            group["steps"] = t = group.get("steps", 0) + 1
            beta = group["momentum"] * (1 - group["momentum"] ** (t - 1)) / (1 - group["momentum"] ** t)
            for parameter in group["params"]:
                old = self.state[parameter].get("momentum_buffer", torch.zeros_like(parameter))
                new = beta * old + (1 - beta) * parameter.grad
                self.state[parameter]["momentum_buffer"] = new
                parameter.data.sub_(group["lr"] * new)


# The split transform


def test_the_split_transform_is_sds_split_with_transport() -> None:
    one, other, without = Network(), Network(), Network()
    train(one, SDSPreconditioner(AdamW(one.parameters(), lr=0.02), one, "lora-rite"), 6)
    inner = AdamW(other.parameters(), lr=0.02)
    train(other, SDSPreconditioner(inner, other, "sds-split", transport="moments"), 6)
    assert_same(one, other)
    train(without, SDSPreconditioner(AdamW(without.parameters(), lr=0.02), without, "sds-split"), 6)
    assert not torch.equal(one.first.A, without.first.A)
    assert make_correction("lora-rite") == TrackBasis(make_correction("sds-split"))


# The matrix second moment, against the paper's algorithm


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_runs_against_the_papers_algorithm(momentum: float) -> None:
    model = start()
    inner = Average(model.parameters(), lr=RATE, momentum=momentum)
    run(model, SDSPreconditioner(inner, model, UNLIMITED, damping=0.0))

    by_hand = start()
    A, B = by_hand.A.detach(), by_hand.B.detach()
    of_A, of_B = oracle.Rite(momentum, 0.9), oracle.Rite(momentum, 0.9)
    for step in range(12):
        gA, gB = S * B.T @ gradient(step), S * gradient(step) @ A.T
        A, B = A - RATE * of_A.step(B, gA.T).T, B - RATE * of_B.step(A.T, gB)
    torch.testing.assert_close(model.A.detach(), A, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.B.detach(), B, rtol=1e-9, atol=1e-10)
    assert of_A.rho > 1e-3 < of_B.rho  # mass did escape, and was counted
    for parameter, rite in ((model.A, of_A), (model.B, of_B)):
        state = inner.state[parameter]
        weight = 1 - 0.9**12
        torch.testing.assert_close(state["sdsopt_weight"], torch.full((1, 1, 1), weight, dtype=torch.float64))
        # Ours has been carried on to the basis after the step, and there lost a little more.
        assert state["sdsopt_escaped_mass"].item() / weight > rite.rho


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_runs_against_pytorch_optimizer(momentum: float, dtype: torch.dtype) -> None:
    """Without what it adds: clipping, the skipping of large gradients, an absolute ε."""
    package = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    model, theirs, without = start(dtype), start(dtype), start(dtype)
    options: dict[str, Any] = {"eps": 0.0, "clip_unmagnified_grad": 0.0, "update_skipping": 0.0, "apply_escape": True}
    other = package.LoRARite([theirs.A, theirs.B], lr=RATE, betas=(momentum, 0.9), **options)
    run(theirs, other)
    inner = Average(model.parameters(), lr=RATE, momentum=momentum)
    run(model, SDSPreconditioner(inner, model, UNLIMITED, damping=0.0))
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(model.delta, theirs.delta, rtol=tolerance, atol=tolerance)
    options["apply_escape"] = False
    run(without, package.LoRARite([without.A, without.B], lr=RATE, betas=(momentum, 0.9), **options))
    assert (without.delta - theirs.delta).abs().max() > 1e-2  # so the escaped mass is part of what was compared


def test_sgd_differs_in_how_momentum_starts_alone() -> None:
    """Its first average is the first step whole: later ones weigh that by βᵗ, and not by βᵗ·(1 - β)."""
    model, other = start(), start()
    correction = MatrixMoment(GramPower(0.5), damping=0.0)
    sgd = SGD(model.parameters(), lr=1e-9, momentum=0.9, dampening=0.9)
    run(model, SDSPreconditioner(sgd, model, correction), 3)
    average = Average(other.parameters(), lr=1e-9, momentum=0.9)
    run(other, SDSPreconditioner(average, other, correction), 3)
    # With factors that hardly move, both are weighted means of the same three corrected gradients.
    one, two = (inner.state[p]["momentum_buffer"] for inner, p in ((sgd, model.A), (average, other.A)))
    assert not torch.allclose(one, two, rtol=1e-2)


# Accuracy


@pytest.mark.parametrize("condition", [2.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 8, 33, 128])
def test_the_first_step(rank: int, dtype: torch.dtype, condition: float) -> None:
    model = lora_linear(150, 140, rank, condition=condition, scaling=2.0, dtype=dtype)
    model.backward_from(gradient(0, 150, 140))
    assert model.A.grad is not None and model.B.grad is not None
    seen = corrected_gradients(model, "lora-rite-matrix")
    inside = oracle.corrected(model.A.detach(), model.B.detach(), model.A.grad, model.B.grad, 0.5, 1e-6)
    wanted_A = oracle.inverse_root(inside[0].T / 140**0.5, 0.5, 1e-6) @ inside[0]
    wanted_B = inside[1] @ oracle.inverse_root(inside[1] / 150**0.5, 0.5, 1e-6)
    for parameter, wanted in ((model.A, wanted_A), (model.B, wanted_B)):
        assert oracle.relative_error(seen[parameter], wanted) < torch.finfo(dtype).eps + 1e-8
        assert seen[parameter].square().mean() <= 1 + 1e-6  # the coordinates' mean square, as Adam's


# At κ = 1e6 float32 rounds the weak directions of the factors themselves away: sds-split then differs by 6e-3.
@pytest.mark.parametrize(("condition", "tolerance"), [(1e3, 1e-3), (1e6, 0.2)])
@pytest.mark.parametrize("rank", [1, 33, 128])
def test_float32_follows_float64(rank: int, condition: float, tolerance: float) -> None:
    """Though V is kept in the factors' dtype."""
    seen: list[Tensor] = []
    for dtype in (torch.float64, torch.float32):
        model = lora_linear(150, 140, rank, condition=condition, dtype=torch.float32).to(dtype)
        optimizer = SDSPreconditioner(SGD(model.parameters(), lr=1e-3), model, "lora-rite-matrix")
        for step in range(5):
            model.backward_from(gradient(step, 150, 140))
            optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters())
        seen.append(model.delta - lora_linear(150, 140, rank, condition=condition, dtype=torch.float32).delta)
    assert oracle.relative_error(seen[1], seen[0]) < tolerance


# What the paper claims of it


def final(optimizer_of: Callable[[LoRALinear], Optimizer], Q: Tensor) -> Tensor:
    model = start()
    model.A, model.B = torch.linalg.inv(Q) @ model.A.detach(), model.B.detach() @ Q
    return run(model, optimizer_of(model)).delta


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_whole_runs_do_not_depend_on_the_factorization(condition: float) -> None:
    """Unlike those with Adam's diagonal second moment in the same bases."""
    Q = factor(RANK, RANK, condition, seed=7)

    def rite(model: LoRALinear) -> Optimizer:
        return SDSPreconditioner(SGD(model.parameters(), lr=RATE, momentum=0.9), model, UNLIMITED, damping=0.0)

    def adam(model: LoRALinear) -> Optimizer:
        split = TrackBasis(UNLIMITED.correction)
        return SDSPreconditioner(AdamW(model.parameters(), lr=RATE, weight_decay=0.0), model, split, damping=0.0)

    identity = torch.eye(RANK, dtype=torch.float64)
    assert oracle.relative_error(final(rite, Q), final(rite, identity)) < 1e-7
    assert oracle.relative_error(final(adam, Q), final(adam, identity)) > 1e-2


def test_escaped_mass_keeps_the_step_from_growing() -> None:
    """B turns to an orthogonal subspace: V is lost, and without ρ the next step would count as the first."""
    correction, V = MatrixMoment(), torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))[None]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    memory = {"second_moment": V, "escaped_mass": 0 * one, "weight": one}
    carried = correction.carry(memory, torch.zeros_like(V))
    assert not carried["second_moment"].any()
    assert carried["escaped_mass"].item() == 4.0
    assert carried["weight"] is one
    resting = correction.carry(memory, torch.eye(2, dtype=torch.float64)[None])
    assert torch.equal(resting["second_moment"], V) and resting["escaped_mass"].item() == 0.0
    assert correction.carry({}, V) == {}


# Around others


@pytest.mark.parametrize("inside", [GramPower(0.0), GramPower(1.0), KeepNorm(GramPower(0.5))], ids=str)
def test_around_another_correction(inside: Any) -> None:
    """V divides by itself what that correction gives: in the first step all singular values become equal."""
    model = start()
    model.backward_from(gradient(0))
    seen = corrected_gradients(model, MatrixMoment(inside, damping=0.0), damping=0.0)
    for parameter, length in ((model.A, COLUMNS), (model.B, ROWS)):
        values = torch.linalg.svdvals(seen[parameter].detach())
        torch.testing.assert_close(values, torch.full_like(values, length**0.5))
    trained, plain = start(), start()
    run(trained, SDSPreconditioner(SGD(trained.parameters(), lr=RATE, momentum=0.9), trained, MatrixMoment(inside)))
    run(plain, SDSPreconditioner(SGD(plain.parameters(), lr=RATE, momentum=0.9), plain, inside))
    assert all(p.isfinite().all() for p in trained.parameters())
    assert not torch.allclose(trained.delta, plain.delta, rtol=1e-2)


def test_rescaling_around_it_keeps_its_memory() -> None:
    model, forgetful = start(), start()
    keep = KeepNorm(MatrixMoment())
    inner = SGD(model.parameters(), lr=RATE)
    run(model, SDSPreconditioner(inner, model, keep))
    assert inner.state[model.A]["sdsopt_second_moment"].any()
    for step in range(12):
        run(forgetful, SDSPreconditioner(SGD(forgetful.parameters(), lr=RATE), forgetful, keep), 1, first=step)
    assert not torch.allclose(model.delta, forgetful.delta, rtol=1e-2)


def test_a_factor_that_sits_out_keeps_its_memory() -> None:
    model = start()
    inner = SGD(model.parameters(), lr=RATE)
    optimizer = SDSPreconditioner(inner, model, "lora-rite-matrix")
    run(model, optimizer, 2)
    of_A, of_B = ({k: v.clone() for k, v in inner.state[p].items() if k[0] == "s"} for p in (model.A, model.B))
    model.backward_from(gradient(2))
    model.A.grad = None
    optimizer.step()
    # A rests, so B's basis does and loses nothing: what was lost before fades.
    assert torch.equal(inner.state[model.B]["sdsopt_escaped_mass"], 0.999 * of_B["sdsopt_escaped_mass"])
    # A's gradient added nothing, but its basis moved with B.
    assert torch.equal(inner.state[model.A]["sdsopt_weight"], of_A["sdsopt_weight"])
    assert not torch.equal(inner.state[model.A]["sdsopt_second_moment"], of_A["sdsopt_second_moment"])


def test_pairs_with_and_without_a_memory_of_one_shape() -> None:
    """One of two layers is trained from the second step on."""
    models = [torch.nn.ModuleList([start(), start()]) for _ in range(2)]
    for index, model in enumerate(models):
        alone = [model] if index == 0 else list(model)
        optimizers = [SDSPreconditioner(SGD(m.parameters(), lr=RATE), m, "lora-rite-matrix") for m in alone]
        for step in range(3):
            for layer in list(model)[: 1 if step == 0 else 2]:
                layer.backward_from(gradient(step))  # pyright: ignore
            for optimizer in optimizers[: 1 if step == 0 else 2]:
                optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_distributed_checkpoint_on_disk_holds_the_memory(tmp_path: Path) -> None:
    """Its loader asks for what a fresh optimizer's fake step has created, so that must be the memory too."""

    def wrapped(model: Network) -> SDSPreconditioner:
        return SDSPreconditioner(AdamW(model.parameters(), lr=0.01), model, "lora-rite-matrix")

    model, resumed = Network(), Network(seed=1)
    optimizer, again = wrapped(model), wrapped(resumed)
    train(model, optimizer, 3)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    checkpoint.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path)
    of_model, of_optimizer = get_state_dict(resumed, again)
    checkpoint.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=tmp_path)
    set_state_dict(resumed, again, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert again.state[resumed.first.A]["sdsopt_second_moment"].any()
    train(model, optimizer, 3, first=3)
    train(resumed, again, 3, first=3)
    assert_same(model, resumed)


def test_bad_settings() -> None:
    for beta in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\)"):
            MatrixMoment(beta=beta)
    with pytest.raises(ValueError, match="damping must be a number"):
        MatrixMoment(damping=-1.0)
    with pytest.raises(UnsupportedCorrectionError, match="basis_exponent is None"):
        MatrixMoment(make_correction("lora-fa"))
    with pytest.raises(UnsupportedCorrectionError, match="once is enough"):
        MatrixMoment(KeepNorm(MatrixMoment()))
