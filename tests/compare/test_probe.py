"""What a run's record says of its adapters, against formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdsopt import Recorder, available_corrections, find_pairs
from sdsopt.compare import FactorizationTask, Record, Task
from sdsopt.compare.grid import Run
from sdsopt.compare.methods import make_inner, make_method
from sdsopt.compare.probe import Probe
from sdsopt.compare.train import train
from sdsopt.corrections import make_correction
from toy import LoRALinear, factor
from toy_task import Regression


def trained(correction: str, task: Task | None = None, steps: int = 20) -> Record:
    return train(task or Regression(), Run(make_method(correction), make_inner("sgd"), 0.02, 0, 3, steps), "f")


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    first = LoRALinear(torch.randn(2, 5), torch.randn(4, 2), scaling=-0.5)
    return nn.Sequential(first, LoRALinear(torch.randn(3, 4), torch.randn(6, 3)))


def test_spectra_are_medians_over_the_pairs() -> None:
    model = two_layers()
    first, second = find_pairs(model)
    assert first.scaling == -0.5
    A, B, product = Probe([first, second], None, 1e-6, 10).spectra()
    for found, matrices in (
        (A, (first.A, second.A)),
        (B, (first.B, second.B)),
        (product, (0.5 * first.B @ first.A, second.scaling * second.B @ second.A)),
    ):
        one, other = (torch.linalg.svdvals(matrix.detach().double()) for matrix in matrices)
        # Only the second pair has a third position.
        expected = [*((one[:2] + other[:2]) / 2).tolist(), other[2].item()]
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("correction", [None, "sds", "sds-split"])
def test_the_alignment_is_the_recorders(correction: str | None) -> None:
    model = two_layers()
    x = torch.randn(7, 5)
    probe = Probe(find_pairs(model), correction and make_correction(correction), 1e-6, steps=10)
    with Recorder(model, None, ["sds", "sds-split"], full_gradients="*") as recorder, probe.around(0):
        model(x).square().sum().backward()
        expected = recorder.measure().scalars()[f"{correction or 'lora'}/alignment"]
    with probe.around(1):  # not every step is measured
        model(x).square().sum().backward()
    assert probe.alignment_steps == [0]
    assert probe.alignments == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize("correction", available_corrections())
def test_every_methods_record(correction: str) -> None:
    record = trained(correction)
    assert [len(values) for values in (record.spectrum_A, record.spectrum_B, record.spectrum_product)] == [3, 3, 3]
    assert list(record.spectrum_product) == sorted(record.spectrum_product, reverse=True)
    assert record.spectrum_product[0] > 0  # B, zero at first, has moved
    assert record.alignment_steps == (0, 4, 8, 12, 16)
    assert all(0 < cosine <= 1 + 1e-9 for cosine in record.alignment)
    assert Record.from_json(record.to_json()) == record


def test_measuring_does_not_change_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = trained("sds")
    monkeypatch.setattr("sdsopt.compare.probe._ALIGNMENT_LAYERS", 0)
    alone = trained("sds")
    assert alone.alignment == () != measured.alignment
    assert replace(measured, alignment=(), alignment_steps=(), seconds=0) == replace(alone, seconds=0)


def test_full_fine_tuning_and_divergence_have_no_spectra() -> None:
    full = Run(replace(make_method("lora"), name="full", adapts=False), make_inner("sgd"), 0.02, 0, 3, 5)
    diverged = trained("lora", Regression(explode=True))
    for record in (train(Regression(), full, "f"), diverged):
        assert record.spectrum_A == record.spectrum_product == record.alignment == ()


def test_layers_without_an_input_have_no_alignment() -> None:
    """The factorization's model is a function of nothing."""
    record = trained("sds", FactorizationTask())
    assert record.alignment == ()
    assert len(record.spectrum_A) == 3


def test_few_layers_are_watched_and_spread_over_the_model() -> None:
    model = nn.Sequential(*(LoRALinear(factor(2, 4).float(), factor(4, 2).float()) for _ in range(17)))
    probe = Probe(find_pairs(model), None, 1e-6, 10)
    x: Tensor = torch.randn(3, 4)
    hooks: list[int] = []
    with probe.around(0):
        hooks = [i for i, layer in enumerate(model) if layer._forward_hooks]
        model(x).sum().backward()
    assert hooks == [0, 2, 4, 6, 8, 10, 12, 14]
    assert not any(layer._forward_hooks for layer in model)


@pytest.mark.parametrize("options", [{"damping": 0.1}, {"update_every": 3}])
def test_a_methods_options_are_its_identity(options: dict[str, Any]) -> None:
    """Else a sweep would take the one's results for the other's. And they act."""
    plain = make_method("sds")
    other = replace(plain, **options)
    assert other.identity != plain.identity
    losses = [train(Regression(), Run(m, make_inner("sgd"), 0.02, 0, 3, 9), "f").losses for m in (plain, other)]
    assert losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]
