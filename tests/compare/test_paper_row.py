"""The paper's own parametrization as a row of the comparison."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sdsopt.compare import Settings, Task, compare
from sdsopt.compare.markdown import make_markdown
from sdsopt.compare.methods import make_method
from sdsopt.errors import UnsupportedLayerError
from sdsopt.reference import SDSSchedule, convert
from toy_task import Regression

SETTINGS = Settings(
    ("lora", "sds", "sds-paper"), inner=("adamw",), lrs=(0.005, 0.02), seeds=(0, 1), ranks=(2,), steps=16
)


@dataclass(frozen=True)
class Layers(Task):
    """Two linear layers of PEFT's learn another function than they compute."""

    def build_model(self, rank: int | None) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
        if rank is None:
            return base
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])
        return peft.get_peft_model(base, config)  # pyright: ignore

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(16, 8, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch[:, :4]).square().mean()

    def evaluate(self, model: nn.Module) -> float:
        return 0.5


def test_a_sweep_has_its_row_with_equal_budgets(tmp_path: Path) -> None:
    comparison = compare(Layers(), SETTINGS, out=tmp_path)
    assert [row.method for row in comparison.rows] == ["full", "lora", "sds", "sds-paper"]
    runs = {
        m: [(r.lr, r.seed, len(r.losses)) for r in comparison.records if r.method == m] for m in ("sds", "sds-paper")
    }
    assert runs["sds"] == runs["sds-paper"] and len(runs["sds"]) == 4
    table = make_markdown(comparison.rows, comparison.step_times, comparison.title)
    assert "| `sds-paper` |" in table
    assert comparison.step_times["adamw", 2, "sds-paper"] > 0
    assert all(not record.kappa_A for record in comparison.records if record.method == "sds-paper")
    assert all(path.exists() for path in comparison.save_report())


def test_its_runs_are_those_of_the_loop_by_hand(tmp_path: Path) -> None:
    """Ten steps of plain LoRA, to the bit; then the split, and a refresh after each step that the schedule names."""
    records = compare(Layers(), replace(SETTINGS, lrs=(0.02,), seeds=(1,)), out=tmp_path).records
    losses = {record.method: record.losses for record in records}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Layers().build_model(2)
    convert(model)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    schedule = SDSSchedule(model, optimizer, total_steps=16)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + _cosine(step)))
    by_hand: list[float] = []
    batches = Layers().batches(1)
    for _ in range(16):
        optimizer.zero_grad()
        loss = Layers().loss(model, next(batches))
        loss.backward()
        optimizer.step()
        schedule.step()
        cosine.step()
        by_hand.append(loss.item())
    assert losses["sds-paper"] == pytest.approx(by_hand, rel=1e-5)
    assert losses["sds-paper"][:11] == pytest.approx(losses["lora"][:11], rel=1e-5)
    assert abs(losses["sds-paper"][-1] - losses["lora"][-1]) > 1e-3


def _cosine(step: int) -> float:
    return torch.cos(torch.tensor(torch.pi * step / 16, dtype=torch.float64)).item()


def test_it_is_found_on_disk_and_can_be_sent_to_processes(tmp_path: Path) -> None:
    settings = replace(SETTINGS, lrs=(0.02,), seeds=(0,))
    first, again = (compare(Layers(), settings, out=tmp_path) for _ in range(2))
    assert first.records == again.records  # the seconds included
    method = make_method("sds-paper")
    assert pickle.loads(pickle.dumps(method)) == method


def test_runs_that_are_too_short_are_refused_before_any_runs() -> None:
    with pytest.raises(ValueError, match="sds-paper needs at least 11 steps, got 10"):
        Settings(("lora", "sds-paper"), steps=10)
    assert Settings(("lora", "sds-paper"), steps=11).methods[-1] is make_method("sds-paper")


def test_layers_that_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayerError, match="it is a LoRALinear, and only PEFT's"):
        compare(Regression(), SETTINGS, out=tmp_path)
