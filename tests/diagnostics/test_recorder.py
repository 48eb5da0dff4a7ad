"""Measurements of live gradients, against float64 formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.checkpoint import checkpoint

import oracle
from sdsopt import GramPower, Recorder, SDSPreconditioner, attach, available_corrections, find_pairs
from sdsopt.diagnostics import FullGradients, alignment
from sdsopt.errors import DoubleCorrectionError, NoPairsError, UnsupportedGradientError
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


def test_gradients_that_backward_corrected_are_refused() -> None:
    model = Network()
    with attach(model):
        model.loss().backward()
        with pytest.raises(DoubleCorrectionError, match="corrected in backward"):
            Recorder(model).measure()


def test_a_closure_is_refused_with_the_way_out() -> None:
    model = Network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer), pytest.raises(ValueError, match=r"call measure\(\) between backward and step"):
        optimizer.step(lambda: 0.0)


def test_mistakes() -> None:
    with pytest.raises(NoPairsError, match="no pair's name fits the pattern 'nothing'; the first of 2 is first"):
        Recorder(Network(), full_gradients="nothing")
    with pytest.raises(ValueError, match="every must be at least 1"):
        Recorder(Network(), every=0)


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


def test_the_full_gradient_of_a_peft_layer_is_its_base_weights() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 4), nn.Tanh()), config)
    base = model.base_model.model[0].base_layer.weight.requires_grad_()
    with FullGradients(find_pairs(model)) as full:
        model(torch.randn(3, 5)).square().sum().backward()
        [G] = full.gradients.values()
    torch.testing.assert_close(G, base.grad)
