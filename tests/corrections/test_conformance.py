"""What every registered correction must do, whatever its formula. A new one is tested here without a new line."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, AdamW

import oracle
from recorder import corrected_gradients
from sdsopt import Correction, Factors, LearningRates, PairTensors, SDSPreconditioner, available_corrections
from sdsopt.compare import Settings, compare
from sdsopt.compare.learning_rates import default_learning_rates
from sdsopt.corrections import make_correction
from sdsopt.linalg import make_inverse_root
from toy import LoRALinear, Network, assert_same, factor, lora_linear, train
from toy_task import Regression

NAMES = available_corrections()
ROOT = Path(__file__).parents[2]
DAMPING = 1e-6

# The step of SGD with the loss times c is c^degree times as long. Every correction that is not named has degree 1.
DEGREES = {"lora-muon": 0, "lora-rite-matrix": 0}
# Those whose page is that of another one; the members of `GramPower` share that of the method.
PAGES = {"lora-rite-matrix": "lora-rite"}
# These never move A.
FREEZES_A = {"lora-fa"}
# These move one factor a step.
TAKES_TURNS = {"altlora"}

every = pytest.mark.parametrize("name", NAMES)


def test_there_are_corrections() -> None:
    of_papers = {"lora-pro", "reflora", "lora-fa", "lora-muon", "altlora", "lora-rite", "lora-rite-matrix"}
    assert {"lora", "sds", "sds-split", "scaled", *of_papers} <= set(NAMES)


@every
def test_it_has_a_page(name: str) -> None:
    page = ROOT / "docs" / "corrections" / f"{PAGES.get(name, name)}.md"
    text = (
        page.read_text(encoding="utf8") if page.exists() else (ROOT / "docs" / "method.md").read_text(encoding="utf8")
    )
    assert f"`{name}`" in text


@dataclass(frozen=True)
class Batch:
    """Pairs of one shape with a gradient, as the engine hands them to a correction; tensors (e, …) in float64."""

    A: Tensor
    B: Tensor
    G: Tensor
    E: Tensor | None = None
    scaling: float = 0.5

    @property
    def gradients(self) -> PairTensors:
        A, B = (self.A, self.B) if self.E is None else (self.E[:, None] * self.A, self.B * self.E)
        return PairTensors(A=self.scaling * B.mT @ self.G, B=self.scaling * self.G @ A.mT)

    @property
    def updates(self) -> PairTensors:
        return self.gradients.map(lambda gradient: -1e-3 * gradient)

    def factors(self, correction: Correction) -> Factors:
        known = Factors(self.A, self.B, self.scaling, torch.float64, {}, {}, self.E)
        root, exponents = make_inverse_root("eigh"), correction.gram_exponents
        roots = [
            dict(zip(exponents, root.compute(root.reduce(tall), exponents, DAMPING).roots, strict=True))
            for tall in (known.partner_A.mT, known.partner_B)
        ]
        return Factors(self.A, self.B, self.scaling, torch.float64, *roots, self.E)

    def part(self, index: int) -> Batch:
        return Batch(*(tensor[index : index + 1] for tensor in (self.A, self.B, self.G)))


def batch(size: int = 3, rank: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    conditions = [1.0, 10.0, 300.0][:size]
    return Batch(
        A=torch.stack([factor(rank, 10, condition, seed) for seed, condition in enumerate(conditions)]),
        B=torch.stack([factor(12, rank, condition, 10 + seed) for seed, condition in enumerate(conditions)]),
        G=torch.randn(size, 12, 10, generator=generator, dtype=torch.float64),
    )


def both_maps(correction: Correction, given: Batch) -> list[PairTensors]:
    """What it makes of the gradients, and of an update."""
    factors = given.factors(correction)
    rates = LearningRates(0.01, 0.01)
    return [
        correction.precondition(factors, given.gradients),
        correction.postcondition(factors, given.updates, rates),
    ]


@every
def test_its_arguments_stay_as_they_are(name: str) -> None:
    correction, given = make_correction(name), batch()
    factors, gradients, updates = given.factors(correction), given.gradients, given.updates
    arguments = [factors.A, factors.B, *factors.roots_A.values(), *factors.roots_B.values(), *gradients, *updates]
    before = copy.deepcopy(arguments)
    correction.precondition(factors, gradients)
    correction.postcondition(factors, updates, LearningRates(0.01, 0.01))
    for argument, value in zip(arguments, before, strict=True):
        assert argument is not None and value is not None
        assert torch.equal(argument, value)


@every
def test_it_commutes_with_the_batch(name: str) -> None:
    correction, given = make_correction(name), batch()
    together = both_maps(correction, given)
    for index in range(len(given.A)):
        alone = both_maps(correction, given.part(index))
        for whole, single in zip(together, alone, strict=True):
            for many, one in zip(whole, single, strict=True):
                assert (many is None) == (one is None)
                if many is not None and one is not None:
                    assert oracle.relative_error(many[index], one[0]) < 1e-9


@every
def test_a_diagonal_between_the_factors_belongs_to_the_partner(name: str) -> None:
    """AdaLoRA's B·diag(E)·A: each gradient is corrected as that of a plain pair whose partner holds E."""
    correction, given = make_correction(name), batch(size=1)
    E = torch.tensor([2.0, -0.5, 1.0, 3.0], dtype=torch.float64)
    with_diagonal = Batch(given.A, given.B, given.G, E)
    plain = Batch(E[:, None] * given.A, given.B * E, given.G)
    found, expected = (
        correction.precondition(this.factors(correction), this.gradients) for this in (with_diagonal, plain)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)


@every
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 8, 33, 128])
def test_dtype_shape_and_contiguity_are_kept(name: str, rank: int, dtype: torch.dtype, condition: float) -> None:
    """Rank 128 is above the matrix's own."""
    model = lora_linear(60, 50, rank, condition=condition, scaling=2.0, dtype=dtype)
    model.backward_from(batch_gradient(60, 50))
    seen = corrected_gradients(model, name)
    assert model.B in seen
    for parameter, gradient in seen.items():
        assert gradient.dtype == dtype
        assert gradient.shape == parameter.shape
        assert gradient.is_contiguous()
        assert gradient.isfinite().all()
    SDSPreconditioner(SGD(model.parameters(), lr=1e-6), model, name).step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def batch_gradient(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@every
@pytest.mark.parametrize("zero", [{"A"}, {"B"}, {"A", "B"}], ids=lambda zero: "".join(sorted(zero)))
def test_zero_factors_stay_finite(name: str, zero: set[str]) -> None:
    """B = 0 is LoRA's start, from which it must get away; where A = 0, B's start."""
    model = lora_linear(dtype=torch.float32)
    for side in zero:
        setattr(model, side, torch.zeros_like(getattr(model, side)))
    optimizer = SDSPreconditioner(AdamW(model.parameters(), lr=0.01), model, name)
    for _ in range(5):
        model.backward_from(model.delta - 1)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.delta.any() == (zero == {"B"} or (zero == {"A"} and name not in FREEZES_A))


@every
@pytest.mark.parametrize("missing", ["A", "B"])
def test_one_gradient_may_be_missing(name: str, missing: str) -> None:
    model = lora_linear(scaling=2.0)
    frozen, moving = (model.A, model.B) if missing == "A" else (model.B, model.A)
    frozen.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in (frozen, moving)]
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.01, momentum=0.9), model, name)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 10)).square().sum().backward()
        optimizer.step()
    assert torch.equal(frozen, before[0])
    assert moving.isfinite().all()
    assert torch.equal(moving, before[1]) == (missing == "B" and name in FREEZES_A)


@every
@pytest.mark.parametrize("inner", [AdamW, lambda p, lr: SGD(p, lr, momentum=0.9)], ids=["adamw", "sgd"])
def test_at_learning_rate_zero_nothing_moves(name: str, inner: Callable[..., torch.optim.Optimizer]) -> None:
    model = Network()
    start = copy.deepcopy(model)
    train(model, SDSPreconditioner(inner(model.parameters(), lr=0.0), model, name))
    assert_same(model, start)


@every
def test_the_size_of_the_loss_freezes_nothing(name: str) -> None:
    """LoRA-RITE's reference skips the pairs whose gradients are large."""
    steps: list[list[Tensor]] = []
    for scale in (1.0, 1e4):
        model = lora_linear(dtype=torch.float64)
        before = [parameter.detach().clone() for parameter in (model.A, model.B)]
        model.backward_from(scale * batch_gradient(12, 10))
        SDSPreconditioner(SGD(model.parameters(), lr=1e-7), model, name).step()
        steps.append([p.detach() - start for p, start in zip((model.A, model.B), before, strict=True)])
    moved = 0
    for small, large in zip(*steps, strict=True):
        torch.testing.assert_close(large, small * 1e4 ** DEGREES.get(name, 1), rtol=1e-5, atol=0)
        moved += bool(large.any())
    assert moved == (1 if name in FREEZES_A | TAKES_TURNS else 2)


@every
def test_resume_equals_continuous(name: str) -> None:
    def wrap(model: Network) -> SDSPreconditioner:
        return SDSPreconditioner(AdamW(model.parameters(), lr=0.01), model, name)

    continuous, resumed = Network(), Network(seed=1)
    first = wrap(continuous)
    train(continuous, first, 3)
    resumed.load_state_dict(continuous.state_dict())
    second = wrap(resumed)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in ((continuous, first), (resumed, second)):
        train(model, optimizer, 3, first=3)
    assert_same(continuous, resumed)


@every
@pytest.mark.parametrize("condition", [1.0, 100.0])
@pytest.mark.parametrize("scaling", [0.5, -2.0])
def test_a_small_step_descends(name: str, scaling: float, condition: float) -> None:
    """Also with a negative scaling, by which an adapter is subtracted."""
    model = lora_linear(condition=condition, scaling=scaling, dtype=torch.float64)
    G, before = batch_gradient(12, 10), model.delta
    model.backward_from(G)
    SDSPreconditioner(SGD(model.parameters(), lr=1e-7), model, name).step()
    step = model.delta - before
    assert (step * G).sum() < -1e-3 * step.norm() * G.norm()


@every
def test_an_adapter_that_is_switched_off_stays(name: str) -> None:
    """s = 0: there is no gradient."""
    model = lora_linear(scaling=0.0)
    start = copy.deepcopy(model)
    model.backward_from(batch_gradient(12, 10))
    SDSPreconditioner(SGD(model.parameters(), lr=0.1), model, name).step()
    assert_same(model, start)


@every
@pytest.mark.parametrize("inner", ["sgd", "adamw"])
def test_a_small_quadratic_is_solved_from_loras_start(name: str, inner: str) -> None:
    """½‖ΔW − T‖² with T of the adapter's rank, and with B trained alone its part in A's row space."""
    target = factor(12, 3, seed=5) @ factor(3, 10, seed=6)

    def final(lr: float) -> float:
        A = factor(3, 10, seed=1)
        wanted = target @ A.T @ torch.linalg.inv(A @ A.T) @ A if name in FREEZES_A else target
        model = LoRALinear(A, torch.zeros(12, 3, dtype=torch.float64))
        make = {"sgd": SGD, "adamw": AdamW}[inner]
        optimizer = SDSPreconditioner(make(model.parameters(), lr=lr, weight_decay=0.0), model, name)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=150)
        for _ in range(150):
            model.backward_from(model.delta - wanted)
            optimizer.step()
            scheduler.step()
        return float((model.delta - wanted).norm() / wanted.norm())

    assert min(final(lr) for lr in (1.0, 0.3, 0.1, 0.03)) < 0.05


@every
@pytest.mark.parametrize("where", ["gradient", "factor"])
def test_non_finite_numbers_neither_raise_nor_vanish(name: str, where: str) -> None:
    """GradScaler skips a step by them."""
    model = lora_linear()
    model.backward_from(batch_gradient(12, 10))
    assert model.A.grad is not None and model.B.grad is not None
    if where == "gradient":
        model.A.grad[0, 0] = model.B.grad[0, 0] = torch.nan
    else:
        model.A.data[0, 0] = model.B.data[0, 0] = torch.inf
        model.A.grad[:], model.B.grad[:] = torch.nan, torch.nan
    seen = corrected_gradients(model, name)
    assert seen and not any(gradient.isfinite().all() for gradient in seen.values())
    SDSPreconditioner(SGD(model.parameters(), lr=0.1), model, name).step()
    assert not model.B.isfinite().all()


def test_the_comparison_takes_them_all(tmp_path: Path) -> None:
    """By name, without a line for them; and each is another training than plain LoRA's."""
    inners = ("adamw", "sgd")
    settings = Settings(NAMES, full=False, inner=inners, seeds=(0,), ranks=(3,), steps=5, lrs=(0.01,))
    records = compare(Regression(), settings, out=tmp_path).records
    losses = {(record.inner, record.method): record.losses for record in records if not record.diverged}
    assert losses.keys() == {(inner, name) for inner in inners for name in NAMES}
    for inner, name in losses:
        assert len(default_learning_rates(inner, name)) == 6
        assert (losses[inner, name] == losses[inner, "lora"]) == (name == "lora")
