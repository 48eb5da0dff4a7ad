"""Runs, their results on disk, and what an interruption leaves."""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from sdsopt import GramPower
from sdsopt.compare import Observer, Record, Settings, Task, compare, log_grid
from sdsopt.compare.grid import Series, make_grids
from sdsopt.compare.methods import make_inner, make_method
from sdsopt.compare.store import JsonLines
from sdsopt.compare.widen import widened
from toy_task import Regression

SMALL = Settings(corrections=("lora", "sds"), inner=("sgd",), lrs=(0.05, 0.1), seeds=(0, 1), ranks=(3,), steps=12)
RUNS = 3 * 2 * 2  # with full fine-tuning


class Counting(Observer):
    def __init__(self, stop_after: int | None = None) -> None:
        self.records: list[Record] = []
        self.total = self.done = 0
        self.is_closed = False
        self.stop_after = stop_after

    def started(self, total: int, done: int) -> None:
        self.total, self.done = total, done

    def finished(self, record: Record) -> None:
        self.records.append(record)
        if len(self.records) == self.stop_after:
            raise KeyboardInterrupt

    def closed(self) -> None:
        self.is_closed = True


def lines(folder: Path) -> list[str]:
    return (folder / "runs.jsonl").read_text().splitlines()


def test_every_run_is_a_line_of_json(tmp_path: Path) -> None:
    observer = Counting()
    comparison = compare(Regression(), SMALL, out=tmp_path, observer=observer)
    assert (observer.total, observer.done, len(observer.records)) == (RUNS, 0, RUNS)
    assert observer.is_closed
    parsed = [json.loads(line) for line in lines(tmp_path)]
    assert {(p["method"], p["lr"], p["seed"]) for p in parsed} == {
        (method, lr, seed) for method in ("full", "lora", "sds") for lr in (0.05, 0.1) for seed in (0, 1)
    }
    assert len(comparison.records) == RUNS
    assert all(len(record.losses) == 12 for record in comparison.records)
    assert all(row.best and row.best.loss.mean < row.best.records[0].losses[0] for row in comparison.rows)
    assert all(0 <= (record.accuracy or 0) <= 1 for record in comparison.records)
    adapted = [record for record in comparison.records if record.method == "sds"]
    assert all(record.kappa_A[-1] and record.kappa_B[0] is None for record in adapted)
    assert comparison.step_times["sgd", 3, "lora"] == 1.0


def test_an_interrupted_sweep_resumes_and_ends_the_same(tmp_path: Path) -> None:
    whole = compare(Regression(), SMALL, out=tmp_path / "whole")
    observer = Counting(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        compare(Regression(), SMALL, out=tmp_path / "cut", observer=observer)
    assert observer.is_closed
    assert len(lines(tmp_path / "cut")) == 5

    again = Counting()
    resumed = compare(Regression(), SMALL, out=tmp_path / "cut", observer=again)
    assert (again.done, len(again.records)) == (5, RUNS - 5)
    assert [replace(r, seconds=0) for r in resumed.records] == [replace(r, seconds=0) for r in whole.records]


def test_a_line_cut_short_is_run_again(tmp_path: Path) -> None:
    compare(Regression(), SMALL, out=tmp_path)
    text = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(text[:-40])
    observer = Counting()
    compare(Regression(), SMALL, out=tmp_path, observer=observer)
    assert len(observer.records) == 1
    assert all(json.loads(line) for line in lines(tmp_path)[-1:])


def test_what_changes_the_result_is_run_again(tmp_path: Path) -> None:
    compare(Regression(), SMALL, out=tmp_path)
    for task, settings, expected in (
        (Regression(), SMALL, 0),
        (Regression(), replace(SMALL, steps=11), RUNS),
        (Regression(), replace(SMALL, ranks=(2,)), RUNS - 4),  # full fine-tuning has no rank
        (Regression(), replace(SMALL, seeds=(0, 1, 2)), RUNS // 2),
        (Regression(batch_size=8), SMALL, RUNS),
    ):
        observer = Counting()
        compare(task, settings, out=tmp_path, observer=observer)
        assert len(observer.records) == expected


def test_fresh_forgets(tmp_path: Path) -> None:
    compare(Regression(), SMALL, out=tmp_path)
    observer = Counting()
    compare(Regression(), SMALL, out=tmp_path, observer=observer, fresh=True)
    assert len(observer.records) == len(lines(tmp_path)) == RUNS


def test_processes_give_the_same_results(tmp_path: Path) -> None:
    alone = compare(Regression(), SMALL, out=tmp_path / "1")
    together = compare(Regression(), SMALL, out=tmp_path / "2", jobs=2)
    assert [replace(r, seconds=0) for r in alone.records] == [replace(r, seconds=0) for r in together.records]


def test_an_interruption_ends_the_processes(tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        compare(Regression(), SMALL, out=tmp_path, jobs=2, observer=Counting(stop_after=2))
    # Not join(): the pool's own thread may collect the process at the same moment.
    deadline = time.monotonic() + 30
    while (left := set(multiprocessing.active_children()) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    assert len(lines(tmp_path)) == 2


def test_an_executor_gives_the_same_results(tmp_path: Path) -> None:
    alone = compare(Regression(), SMALL, out=tmp_path / "1")
    with ThreadPoolExecutor(1) as executor:
        elsewhere = compare(Regression(), SMALL, out=tmp_path / "2", executor=executor)
    assert [replace(r, seconds=0) for r in alone.records] == [replace(r, seconds=0) for r in elsewhere.records]


def test_ranks_are_compared_one_by_one(tmp_path: Path) -> None:
    observer = Counting()
    comparison = compare(Regression(), replace(SMALL, ranks=(1, 3)), out=tmp_path, observer=observer)
    assert len(observer.records) == RUNS + 2 * 2 * 2  # full fine-tuning is the same at both
    assert [(row.rank, row.method) for row in comparison.rows] == [
        (rank, method) for rank in (1, 3) for method in ("full", "lora", "sds")
    ]
    full = [row for row in comparison.rows if row.method == "full"]
    assert full[0].best and full[1].best and full[0].best.loss == full[1].best.loss
    assert comparison.step_times.keys() == {("sgd", row.rank, row.method) for row in comparison.rows}


class LowGrid(Regression):
    def learning_rates(self, inner: str, method: str) -> tuple[float, ...]:
        return (1e-4, 2e-4, 4e-4)


def test_grids_grow_until_no_best_rate_is_an_edge(tmp_path: Path) -> None:
    settings = replace(SMALL, lrs=None, seeds=(0,), widen=2)
    comparison = compare(LowGrid(), settings, out=tmp_path)
    assert all(row.at_edge == "high" for row in comparison.rows)
    assert [[cell.lr for cell in row.cells] for row in comparison.rows] == 3 * [[1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]]
    wide = compare(LowGrid(), replace(settings, widen=20), out=tmp_path)
    assert all(row.at_edge is None for row in wide.rows)
    assert len({len(row.cells) for row in wide.rows}) == 1  # equal budgets


def test_a_grid_that_the_user_names_stays(tmp_path: Path) -> None:
    comparison = compare(Regression(), replace(SMALL, lrs=(1e-4, 2e-4)), out=tmp_path)
    assert all(row.at_edge == "high" and len(row.cells) == 2 for row in comparison.rows)


def series(method: str) -> Series:
    return Series(make_inner("sgd"), 8, make_method(method))


@pytest.mark.parametrize(
    ("sds", "lora", "expected"),
    [
        ((3.0, 1.0, 2.0), (3.0, 1.0, 2.0), ((1.0, 2.0, 4.0), (1.0, 2.0, 4.0))),
        ((1.0, 2.0, 3.0), (2.5, 1.0, 3.0), ((0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0))),
        ((3.0, 2.0, 1.0), (2.5, 1.0, 3.0), ((1.0, 2.0, 4.0, 8.0), (0.5, 1.0, 2.0, 4.0))),
        ((math.inf,) * 3, (2.5, 1.0, 2.0), ((0.5, 1.0, 2.0, 4.0), (1.0, 2.0, 4.0, 8.0))),
    ],
)
def test_widening(sds: tuple[float, ...], lora: tuple[float, ...], expected: tuple[tuple[float, ...], ...]) -> None:
    grids = {series("sds"): (1.0, 2.0, 4.0), series("lora"): (1.0, 2.0, 4.0)}
    assert tuple(widened(grids, {series("sds"): sds, series("lora"): lora}).values()) == expected


def test_a_single_rate_has_no_spacing_to_widen_by() -> None:
    assert widened({series("sds"): (1.0,)}, {series("sds"): [2.0]}) == {series("sds"): (1.0,)}


def test_divergence_is_a_result(tmp_path: Path) -> None:
    comparison = compare(Regression(explode=True), SMALL, out=tmp_path)
    assert all(record.diverged and record.accuracy is None and record.losses == () for record in comparison.records)
    assert all(row.best is None for row in comparison.rows)


def test_two_settings_of_one_correction_are_two_runs(tmp_path: Path) -> None:
    quarter, half = GramPower(0.25), GramPower(0.5)
    settings = replace(SMALL, corrections=(quarter, half), full=False, lrs=(0.1,), seeds=(0,))
    first, second = compare(Regression(), settings, out=tmp_path).records
    assert first.key != second.key
    assert first.losses != second.losses


def test_methods_share_model_and_batches(tmp_path: Path) -> None:
    """The first loss, before any step, is that of the seed alone."""
    records = compare(Regression(), SMALL, out=tmp_path).records
    for seed in (0, 1):
        assert len({record.losses[0] for record in records if record.seed == seed}) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"ranks": (8, 0)}, "rank must be at least 1, got 0"),
        ({"ranks": ()}, "at least one seed, one rank"),
        ({"widen": -1}, "widen must be at least 0"),
        ({"seeds": ()}, "at least one seed"),
        ({"lrs": (0.1, -1.0)}, r"learning rates must be positive numbers, got \[-1.0\]"),
        ({"lrs": ()}, "learning rates must be positive numbers, got none"),
        ({"inner": ("adamw", "adamw")}, "inner optimizers must be distinct"),
        ({"inner": ("lion",)}, "unknown inner optimizer 'lion'; known: adamw, sgd"),
        ({"corrections": ("sdss",)}, "unknown correction 'sdss'"),
        ({"corrections": (), "full": False}, "methods must be distinct and at least one"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_grids(Regression(), replace(SMALL, **change))  # pyright: ignore


def test_jobs_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="jobs must be at least 1"):
        compare(Regression(), SMALL, out=tmp_path, jobs=0)


class Uneven(Regression):
    def learning_rates(self, inner: str, method: str) -> tuple[float, ...]:
        return (0.1,) if method == "lora" else (0.1, 0.2)


def test_every_method_gets_equally_many_learning_rates() -> None:
    with pytest.raises(ValueError, match="equally many learning rates"):
        make_grids(Uneven(), replace(SMALL, lrs=None))


class Short(Regression):
    def batches(self, seed: int):  # pyright: ignore
        from itertools import islice

        return islice(super().batches(seed), 5)


def test_too_few_batches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches ended after 5 of 12 steps"):
        compare(Short(), SMALL, out=tmp_path)


def test_a_tasks_name_and_fingerprint() -> None:
    assert Regression().name == "Regression"
    assert Regression().fingerprint == Regression().fingerprint
    assert len({t.fingerprint for t in (Regression(), Regression(batch_size=3), Uneven())}) == 3
    assert issubclass(Uneven, Task)


def test_log_grid() -> None:
    assert log_grid(0.001, 4) == (0.001, 0.002, 0.004, 0.008)


def test_appending_after_a_cut_line_keeps_both(tmp_path: Path) -> None:
    store = JsonLines(tmp_path / "deep" / "x.jsonl")
    assert store.read() == []
    store.append({"a": 1})
    store.path.write_text(store.path.read_text() + '{"b": ')
    store.append({"c": 3})
    assert store.read() == [{"a": 1}, {"c": 3}]
