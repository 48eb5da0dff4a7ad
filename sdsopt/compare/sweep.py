"""The sweep: what is not on disk yet is run, and goes there run by run."""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

from sdsopt.compare.executors import run_all
from sdsopt.compare.grid import Settings, make_runs
from sdsopt.compare.observer import Observer
from sdsopt.compare.records import Record
from sdsopt.compare.store import JsonLines
from sdsopt.compare.task import Task

_FORMAT = 2  # raise it when a change to this package changes what a run computes or records


def runs_file(directory: Path) -> JsonLines:
    """Returns the file of a folder's records."""
    return JsonLines(directory / "runs.jsonl")


def sweep_fingerprint(task: Task) -> str:
    """Returns what results on disk must carry to be taken for results of this task."""
    return hashlib.sha256(f"format {_FORMAT}, {task.fingerprint}".encode()).hexdigest()[:16]


def sweep(task: Task, settings: Settings, directory: Path, *, jobs: int, observer: Observer) -> list[Record]:
    """Runs what is missing in the folder, and returns the records of all runs, in the order of the grid.

    Args:
        task: A prepared task.
        settings: What to run.
        directory: Where records are looked for and added.
        jobs: Number of processes.
        observer: Hears of every run.
    """
    runs = make_runs(task, settings)
    fingerprint = sweep_fingerprint(task)
    store = runs_file(directory)
    records = _records(store, fingerprint)

    missing = [run for run in runs if run.key not in records]
    observer.started(len(runs), len(runs) - len(missing))
    with closing(run_all(task, missing, fingerprint, jobs)) as finished:  # an exception here ends the processes
        for record in finished:
            # On disk first: what the observer has shown is never lost.
            store.append(record.to_json())
            records[record.key] = record
            observer.finished(record)
    return [records[run.key] for run in runs]


def _records(store: JsonLines, fingerprint: str) -> dict[tuple[object, ...], Record]:
    lines = [line for line in store.read() if line.get("fingerprint") == fingerprint]
    return {record.key: record for record in map(Record.from_json, lines)}
