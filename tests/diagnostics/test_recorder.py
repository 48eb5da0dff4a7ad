"""Measurements of live gradients, against float64 formulas."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

import oracle
import sdsopt
from published_layers import TorchtuneLinear
from sdsopt import GramPower, Recorder, SDSAdamW, SDSPreconditioner, attach, available_corrections, find_pairs
from sdsopt.diagnostics import FullGradients, alignment
from sdsopt.errors import DoubleCorrectionError, NoPairsError, UnsupportedGradientError, UnsupportedOptimizerError
from toy import Network, assert_same, lora_linear, train


def entropy_rank(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


class Layer(nn.Module):
    """A frozen base with a LoRA layer, as in PEFT."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(10, 12, bias=False, dtype=torch.float64)
        self.lora = lora_linear(12, 10, 4, scaling=0.5, dtype=torch.float64, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.lora(x))


def full_gradient(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """∂L/∂W of the base by autograd."""
    layer.zero_grad()
    for x in inputs:
        layer(x).square().sum().backward()
    assert layer.base.weight.grad is not None
    return layer.base.weight.grad.clone()


def batches(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 7, 10, generator=generator, dtype=torch.float64) for _ in range(count)]


def test_the_full_gradient_is_autograds_summed_over_micro_batches() -> None:
    layer = Layer()
    expected = full_gradient(layer, batches())
    with FullGradients(find_pairs(layer)) as full:
        for x in batches():
            layer(x).square().sum().backward()
        [G] = full.gradients.values()
        torch.testing.assert_close(G, expected)
        full.clear()
        assert not full.gradients
    layer(batches()[0]).square().sum().backward()
    assert not full.gradients


def test_gradient_checkpointing_counts_once() -> None:
    layer = Layer()
    expected = full_gradient(layer, batches(1))
    with FullGradients(find_pairs(layer)) as full:
        checkpoint(layer, batches(1)[0], use_reentrant=False).square().sum().backward()  # pyright: ignore
        [G] = full.gradients.values()
    torch.testing.assert_close(G, expected)


@pytest.mark.parametrize("moving", ["both", "A", "B"])
def test_alignment_is_the_cosine_of_the_dense_matrices(moving: str) -> None:
    generator = torch.Generator().manual_seed(0)
    G, A, B, dA, dB = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 7), (3, 7), (9, 3), (3, 7), (9, 3))
    )
    step_A, step_B = (None if moving == "B" else dA), (None if moving == "A" else dB)
    dense = (0 if step_A is None else B @ dA) + (0 if step_B is None else dB @ A)
    expected = torch.nn.functional.cosine_similarity(G.flatten(), dense.flatten(), dim=0)  # pyright: ignore
    torch.testing.assert_close(alignment(G, A, B, step_A, step_B), expected)


def test_alignment_of_no_step_is_not_a_number() -> None:
    G = torch.ones(3, 2)
    assert alignment(G, torch.ones(1, 2), torch.ones(3, 1), None, None).isnan()
    assert alignment(0 * G, torch.ones(1, 2), torch.ones(3, 1), torch.ones(1, 2), None).isnan()


def test_measurements_are_those_of_the_formulas() -> None:
    layer = Layer()
    G = full_gradient(layer, batches())
    layer.zero_grad()
    recorder = Recorder(layer, None, {"sds": GramPower(0.5), "split": GramPower(0.5, 0.5)}, full_gradients="lora*")
    for x in batches():
        layer(x).square().sum().backward()
    [pair] = recorder.measure().pairs.values()
    A, B = layer.lora.A.detach(), layer.lora.B.detach()
    gA, gB = layer.lora.A.grad, layer.lora.B.grad
    assert gA is not None and gB is not None
    assert pair.condition_A == pytest.approx(10.0, rel=1e-6)
    assert pair.spectrum_B == pytest.approx(torch.linalg.svdvals(B).tolist())
    assert pair.effective_rank == pytest.approx(entropy_rank(B @ A))
    values = torch.linalg.svdvals(B @ A)
    assert pair.stable_rank == pytest.approx(float((values**2).sum() / values[0] ** 2))

    polar_A, polar_B = oracle.polar(A.T).T, oracle.polar(B)
    cosine = nn.CosineSimilarity(dim=0)
    for name, dA, dB, move in (
        ("lora", gA, gB, None),
        ("sds", *oracle.corrected(A, B, gA, gB, 0.5, 1e-6), None),
        ("split", *oracle.corrected(A, B, gA, gB, 0.5, 1e-6), polar_B @ polar_B.T @ G + G @ polar_A.T @ polar_A),
    ):
        step = pair.steps[name]
        assert step.effective_rank_A == pytest.approx(entropy_rank(dA), rel=1e-6)
        assert step.effective_rank_B == pytest.approx(entropy_rank(dB), rel=1e-6)
        move = B @ dA + dB @ A if move is None else move
        assert step.alignment == pytest.approx(cosine(G.flatten(), move.flatten()).item(), rel=1e-3)
    # The claim of the paper, where the factors are ill-conditioned: less anisotropy, better alignment.
    lora, sds, split = (pair.steps[name] for name in ("lora", "sds", "split"))
    assert lora.alignment is not None and sds.alignment is not None and split.alignment is not None
    assert lora.alignment < sds.alignment < split.alignment


@pytest.mark.parametrize("correction", available_corrections())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_correction_is_measured_and_descends(correction: str, dtype: torch.dtype) -> None:
    layer = Layer().to(dtype)
    recorder = Recorder(layer, None, [correction], full_gradients="lora*")
    layer(batches()[0].to(dtype)).square().sum().backward()
    step = next(iter(recorder.measure().pairs.values())).steps[correction]
    assert step.alignment is not None and 0 < step.alignment <= 1
    assert step.effective_rank_B is not None and 1 <= step.effective_rank_B <= 4


def test_recording_changes_nothing() -> None:
    plain, recorded = Network(), Network()
    train(plain, SDSPreconditioner(AdamW(plain.parameters(), lr=0.01), plain))
    optimizer = SDSPreconditioner(AdamW(recorded.parameters(), lr=0.01), recorded)
    with Recorder(recorded, optimizer, ["sds", "scaled"], every=2, full_gradients="first*") as recorder:
        train(recorded, optimizer)
    assert_same(plain, recorded)
    assert [measurement.step for measurement in recorder.history] == [0, 2]
    train(recorded, optimizer)
    assert len(recorder.history) == 2


def test_scalars_are_medians_for_a_logger() -> None:
    model = Network()
    with Recorder(model, SGD(model.parameters(), lr=0.1), full_gradients="*first*") as recorder:
        train(model, SGD(model.parameters(), lr=0.1))
        assert not recorder.history  # another optimizer's steps
        model.loss().backward()
        measurement = recorder.measure()
    scalars = measurement.scalars()
    pairs = list(measurement.pairs.values())
    assert len(pairs) == 2
    assert scalars["condition_A"] == pytest.approx(sum(pair.condition_A for pair in pairs) / 2)
    assert scalars["sds/alignment"] == pairs[0].steps["sds"].alignment
    assert pairs[1].steps["sds"].alignment is None
    assert set(scalars) > {"lora/effective_rank_A", "sds/stable_rank_B", "effective_rank"}


def test_nothing_that_is_not_finite_reaches_a_logger() -> None:
    model = Network()
    model.first.B = torch.zeros_like(model.first.B)
    model.loss().backward()
    model.second.requires_grad_(False)
    model.second.zero_grad()
    scalars = Recorder(model).measure().scalars()
    assert "condition_B" not in scalars
    assert "condition_A" in scalars


def test_diagnostics_of_the_wrapper() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    assert optimizer.diagnostics() == {}
    model.loss().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found = optimizer.diagnostics()
    assert found.keys() == {pair.name for pair in optimizer.pairs}
    for pair in found.values():
        assert pair.steps["lora"] != pair.steps["corrected"]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, before[name])


@pytest.mark.parametrize("correction", ["altlora", "lora-rite-matrix", "sds"])
def test_diagnostics_are_those_of_the_step_to_come(correction: str) -> None:
    model = Network(dtype=torch.float64)
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.01), model, correction)
    given: dict[Tensor, Tensor] = {}

    def watch(inner: Optimizer, args: object, kwargs: object) -> None:
        given.update({p: p.grad.clone() for p in model.parameters() if p.grad is not None})

    optimizer.inner.register_step_pre_hook(watch)
    for step in range(4):
        given.clear()
        model.zero_grad()
        model.loss(step).backward()
        before = deepcopy((model.state_dict(), optimizer.state_dict()))
        found = optimizer.diagnostics()
        torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
        optimizer.step()
        for pair in optimizer.pairs:
            measured = found[pair.name].steps["corrected"]
            ranks = {pair.A: measured.effective_rank_A, pair.B: measured.effective_rank_B}
            known = {factor: rank for factor, rank in ranks.items() if rank is not None}
            assert known == pytest.approx({factor: entropy_rank(given[factor]) for factor in ranks if factor in given})
            assert len(known) == (1 if correction == "altlora" else 2)


def test_gradients_that_backward_corrected_are_refused() -> None:
    model = Network()
    with attach(model):
        model.loss().backward()
        with pytest.raises(DoubleCorrectionError, match="corrected in backward"):
            Recorder(model).measure()


def test_a_closure_is_refused_with_the_way_out() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"call measure\(\) between backward and step"), Recorder(model, optimizer):
        optimizer.step(lambda: 0.0)


def test_without_an_optimizer_each_measurement_is_of_one_step() -> None:
    """The way out where there is a closure; it must see what hooks see."""
    by_hooks, by_hand = Network(), Network()
    optimizer = SGD(by_hooks.parameters(), lr=0.1)
    with Recorder(by_hooks, optimizer, full_gradients="first") as expected:
        train(by_hooks, optimizer)
    optimizer = SGD(by_hand.parameters(), lr=0.1)
    with Recorder(by_hand, None, full_gradients="first") as recorder:
        for step in range(3):
            by_hand.zero_grad()
            by_hand.loss(step).backward()
            recorder.measure()
            optimizer.step()
    assert [measurement.step for measurement in recorder.history] == [0, 1, 2]
    assert [m.scalars() for m in recorder.history] == [m.scalars() for m in expected.history]
    assert "sds/alignment" in recorder.history[-1].scalars()


def test_full_gradients_are_formed_only_where_they_are_read() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), lr=0.0)
    with Recorder(model, optimizer, full_gradients="first", every=2) as recorder:
        for step in range(4):
            model.loss(step).backward()
            captured = recorder.measure()  # beside what the optimizer's steps measure
            assert ("lora/alignment" in captured.scalars()) == (step % 2 == 0)
            optimizer.step()
    assert [measurement.step for measurement in recorder.history] == [0, 0, 1, 2, 2, 3]


def test_an_optimizer_around_it_that_takes_no_hooks() -> None:
    """As Accelerate's."""

    class Around(Optimizer):
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:  # pyright: ignore
            self.optimizer.step()

    model = Network()
    around = Around(SGD(model.parameters(), lr=0.1))
    with Recorder(model, around) as recorder:
        train(model, around)
    assert len(recorder.history) == 3

    del around.optimizer
    with pytest.raises(UnsupportedOptimizerError, match="Around takes no step hooks; build the Recorder without"):
        Recorder(model, around, full_gradients="*")
    assert not model.first._forward_hooks


def test_a_recorded_model_is_freed_while_the_caller_still_runs() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    with Recorder(model, optimizer) as recorder:
        train(model, optimizer, 1)
    assert len(recorder.history) == 1
    gone = weakref.ref(model)
    del model, optimizer, recorder
    gc.collect()
    assert gone() is None


def test_the_optimizer_inside_the_wrapper_is_refused() -> None:
    """Its gradients are corrected ones, which would be measured as raw."""
    model = Network()
    sdsopt.link(model)
    optimizer = SDSAdamW(model.parameters(), lr=0.1)
    before = model.first.A.detach().clone()
    expected = "this AdamW steps inside an SDSPreconditioner.*give the Recorder the SDSPreconditioner"
    with pytest.raises(UnsupportedOptimizerError, match=expected), Recorder(model, optimizer.inner):
        train(model, optimizer)
    assert torch.equal(model.first.A, before)


def test_a_recording_of_nothing_warns() -> None:
    model = Network()
    with pytest.warns(UserWarning, match=r"measured nothing: it was built without .*trainer\.create_optimizer\(\)"):
        with Recorder(model, None):
            train(model, SGD(model.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="measured nothing: its optimizer made no step"):
        with Recorder(model, SGD(model.parameters(), lr=0.1)):
            train(model, SGD(model.parameters(), lr=0.1))


def test_mistakes() -> None:
    expected = r"fits the pattern 'nothing', .* with the wildcards \* and \?; the first of 2 is first"
    with pytest.raises(NoPairsError, match=expected):
        Recorder(Network(), full_gradients="nothing")
    with pytest.raises(ValueError, match="every must be at least 1"):
        Recorder(Network(), every=0)


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("up.1[default]", {"up.1[default]"}),  # though it is part of another name
        ("up.1[def", {"up.1[default]", "also.up.1[default]"}),
        ("a*.?[", {"also.up.0[default]", "also.up.1[default]"}),
    ],
)
def test_full_gradients_by_name_or_part_of_it(pattern: str, chosen: set[str]) -> None:
    up, also = (nn.Sequential(*(lora_linear(5, 5, 2, seed=seed) for seed in range(2))) for _ in range(2))
    model = nn.ModuleDict({"up": up, "also": nn.ModuleDict({"up": also})})
    with Recorder(model, None, "sds", full_gradients=pattern) as recorder:
        also(up(torch.randn(3, 5))).sum().backward()
        pairs = recorder.measure().pairs
    assert len(pairs) == 4
    assert {name for name, pair in pairs.items() if pair.steps["sds"].alignment is not None} == chosen


def test_only_linear_layers_can_be_watched() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(nn.Conv2d(2, 2, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(UnsupportedGradientError, match="only linear layers"):
        FullGradients(find_pairs(model))


def test_a_layer_that_is_not_called_as_a_linear_one() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = lora_linear(12, 10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x=x)

    model = ByKeyword()
    pairs = find_pairs(model)
    x = torch.randn(3, 10, dtype=model.layer.A.dtype)
    with FullGradients(pairs), pytest.raises(UnsupportedGradientError, match=r"of layer\[default\] cannot be captured"):
        model(x)
    with FullGradients(pairs, strict=False) as full:
        model(x).sum().backward()
        assert not full.gradients


def peft_dora() -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True)
    return peft.get_peft_model(nn.Sequential(nn.Linear(5, 4)), config)


def torchtune_dora() -> nn.Module:
    layer = TorchtuneLinear(4, 5, 2)
    layer.magnitude = nn.Parameter(torch.ones(4))
    return layer.float()


@pytest.mark.parametrize("build", [peft_dora, torchtune_dora])
def test_rows_that_dora_rescales_are_refused_or_left_out(build: Callable[[], nn.Module]) -> None:
    model = build()
    with pytest.raises(UnsupportedGradientError, match="DoRA rescales the rows"):
        FullGradients(find_pairs(model))
    with FullGradients(find_pairs(model), strict=False) as full:
        model(torch.randn(3, 5)).square().sum().backward()
        assert not full.gradients


def test_the_full_gradient_of_a_peft_layer_is_its_base_weights() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), config)
    base = model.base_model.model[0].base_layer.weight.requires_grad_()
    with FullGradients(find_pairs(model)) as full:
        model(torch.randn(3, 5)).square().sum().backward()
        [G] = full.gradients.values()
    torch.testing.assert_close(G, base.grad)
