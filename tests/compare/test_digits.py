"""The embedded task, at a hundredth of its size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sdsopt import find_pairs
from sdsopt.compare import DigitsTask, Settings, compare
from sdsopt.compare.cache import cache_dir, load_tensors, save_tensors
from sdsopt.compare.tasks.prepared import in_memory

TINY = DigitsTask(width=16, layers=1, pretraining_steps=5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    in_memory.cache_clear()


def test_pretraining_is_cached() -> None:
    TINY.prepare()
    [file] = (cache_dir()).glob("*.pt")
    written = file.stat().st_mtime_ns
    TINY.prepare()
    assert file.stat().st_mtime_ns == written
    assert file.stem == TINY.fingerprint


def test_a_damaged_cache_is_made_again() -> None:
    TINY.prepare()
    [file] = cache_dir().glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    assert load_tensors(TINY.fingerprint) is None
    TINY.prepare()
    assert load_tensors(TINY.fingerprint)


def test_a_failed_save_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_tensors("x", {})
    assert list(cache_dir().iterdir()) == []


def test_without_a_cache_the_task_still_works() -> None:
    model = TINY.build_model(2)
    assert len(find_pairs(model)) == 6


def test_every_method_trains_the_same_matrices_and_head() -> None:
    TINY.prepare()
    torch.manual_seed(0)
    full = TINY.build_model(None)
    torch.manual_seed(0)
    adapted = TINY.build_model(2)
    trained = {name for name, p in full.named_parameters() if p.requires_grad and "classifier" not in name}
    paired = {pair.name.removeprefix("base_model.model.").removesuffix("[default]") for pair in find_pairs(adapted)}
    assert {name.removesuffix(".weight") for name in trained} == paired
    heads = [[p for p in TINY.shared_parameters(m) if p.requires_grad] for m in (full, adapted)]
    assert [len(head) for head in heads] == [2, 2]
    assert all(torch.equal(p, q) for p, q in zip(*heads, strict=True))


def test_seeds_order_the_batches() -> None:
    (images, labels), (same, _), (other, _) = (next(TINY.batches(seed)) for seed in (0, 0, 1))
    assert images.shape == (32, 1, 8, 8)
    assert set(labels.tolist()) <= set(range(5))
    assert torch.equal(images, same)
    assert not torch.equal(images, other)


def test_the_whole_comparison(tmp_path: Path) -> None:
    settings = Settings(corrections=("lora", "sds"), inner=("adamw",), lrs=(0.01,), seeds=(0,), ranks=(2,), steps=20)
    comparison = compare(TINY, settings, out=tmp_path)
    assert [row.method for row in comparison.rows] == ["full", "lora", "sds"]
    assert all(min(record.losses) < record.losses[0] and record.accuracy for record in comparison.records)
    assert comparison.title == "digits: LoRA rank 2, 20 steps"
    names = ["loss_curves", "lr_sensitivity", "condition_numbers", "spectra", "alignment", "cost"]  # one seed
    figures = [f"{name}.png" for name in names]
    assert [path.name for path in comparison.save_report()] == ["report.html", "table.md", *figures]
