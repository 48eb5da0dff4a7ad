"""The sweep: what is not on disk yet is run, and goes there run by run."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from itertools import count
from pathlib import Path
from statistics import fmean

from sdsopt.compare.executors import run_all
from sdsopt.compare.grid import Run, Series, Settings, make_grids, make_runs
from sdsopt.compare.observer import Observer
from sdsopt.compare.records import Record, RunKey, final_loss
from sdsopt.compare.store import JsonLines
from sdsopt.compare.task import Task
from sdsopt.compare.widen import widened

_FORMAT = 2  # raise it when a change to this package changes what a run computes or records


def runs_file(directory: Path) -> JsonLines:
    """Returns the file of a folder's records."""
    return JsonLines(directory / "runs.jsonl")


def sweep_fingerprint(task: Task) -> str:
    """Returns what results on disk must carry to be taken for results of this task."""
    return hashlib.sha256(f"format {_FORMAT}, {task.fingerprint}".encode()).hexdigest()[:16]


def sweep(
    task: Task, settings: Settings, directory: Path, *, jobs: int, executor: Executor | None, observer: Observer
) -> list[Record]:
    """Runs what is missing in the folder, and returns the records of all runs, in the order of the grid.

    Args:
        task: A prepared task.
        settings: What to run.
        directory: Where records are looked for and added.
        jobs: Number of processes, where there is no executor.
        executor: Where runs are computed instead.
        observer: Hears of every run.
    """
    grids = make_grids(task, settings)
    fingerprint = sweep_fingerprint(task)
    store = runs_file(directory)
    records = _records(store, fingerprint)
    for round_ in count():
        runs = make_runs(grids, settings)
        # Full fine-tuning is one run for all ranks.
        missing = list({run.key: run for run in runs if run.key not in records}.values())
        observer.started(len(runs), len(runs) - len(missing))
        with closing(run_all(task, missing, fingerprint, jobs, executor)) as finished:  # an exception ends the runs
            for record in finished:
                # On disk first: what the observer has shown is never lost.
                store.append(record.to_json())
                records[record.key] = record
                observer.finished(record)
        wider = grids if settings.lrs or round_ == settings.widen else widened(grids, _mean_losses(runs, records))
        if wider == grids:
            return [records[run.key].at_rank(run.rank) for run in runs]
        observer.widened()
        grids = wider
    raise AssertionError("unreachable")


def _mean_losses(runs: Sequence[Run], records: Mapping[RunKey, Record]) -> dict[Series, list[float]]:
    losses: dict[Series, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        losses[Series(run.inner, run.rank, run.method)][run.lr].append(final_loss(records[run.key]))
    return {series: [fmean(by_lr[lr]) for lr in sorted(by_lr)] for series, by_lr in losses.items()}


def _records(store: JsonLines, fingerprint: str) -> dict[RunKey, Record]:
    lines = [line for line in store.read() if line.get("fingerprint") == fingerprint]
    return {record.key: record for record in map(Record.from_json, lines)}
