"""`compare`: the whole comparison in one call."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdsopt.compare.grid import Settings
from sdsopt.compare.manifest import load_manifest, save_manifest
from sdsopt.compare.observer import Observer
from sdsopt.compare.records import Record
from sdsopt.compare.step_time import StepTimes, step_times, step_times_file
from sdsopt.compare.summary import Row, row_to_json, summarise
from sdsopt.compare.sweep import runs_file, sweep
from sdsopt.compare.task import Task

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    Attributes:
        task: Name of the task.
        directory: Where its results are.
        records: One for each run.
        step_times: Time of a step relative to plain LoRA, by (inner, rank, method).
    """

    task: str
    directory: Path
    records: tuple[Record, ...]
    step_times: StepTimes

    @cached_property
    def rows(self) -> list[Row]:
        """The statistics of each method."""
        return summarise(self.records)

    @property
    def title(self) -> str:
        """Names the task and its size."""
        ranks = ", ".join(str(rank) for rank in dict.fromkeys(record.rank for record in self.records))
        return f"{self.task}: LoRA rank {ranks}, {self.records[0].steps} steps"

    def to_json(self) -> dict[str, Any]:
        """Returns what the table shows, and every learning rate's loss, as plain JSON types."""
        return {
            "task": self.task,
            "steps": self.records[0].steps,
            "methods": [row_to_json(row, self.step_times.get((row.inner, row.rank, row.method))) for row in self.rows],
        }

    def table(self) -> Table:
        """Returns a `rich.table.Table` to print. Needs the extra `demo`."""
        from sdsopt.compare.table import make_table

        return make_table(self.rows, self.step_times, self.title)

    def save_report(self) -> list[Path]:
        """Writes `report.html`, `table.md` and the figures into `directory`. Needs the extra `demo`.

        Returns:
            Their paths, the report first.
        """
        from sdsopt.compare.figures import save_figures
        from sdsopt.compare.markdown import make_markdown
        from sdsopt.compare.report import make_report

        texts = {"report.html": make_report, "table.md": make_markdown}
        for name, make in texts.items():
            (self.directory / name).write_text(make(self.rows, self.step_times, self.title), encoding="utf8")
        return [self.directory / name for name in texts] + save_figures(
            self.rows, self.step_times, self.directory, self.title
        )


def compare(
    task: Task,
    settings: Settings | None = None,
    *,
    out: str | Path = "sdsopt-results",
    jobs: int = 1,
    executor: Executor | None = None,
    fresh: bool = False,
    times: bool = True,
    observer: Observer | None = None,
) -> Comparison:
    """Trains every method at every learning rate with every seed. What is in the folder already is not run again.

    Args:
        task: What to train.
        settings: What to compare; None for the defaults.
        out: Folder of the results. Several tasks and settings may share one.
        jobs: Number of processes. Above 1, the task must be picklable and a script needs its
            `if __name__ == "__main__":`.
        executor: Computes the runs instead, for example Dask's `Client.get_executor()` or submitit's; the task must be
            picklable, and importable where they run. A run that a lost worker did not finish is the executor's to
            repeat; each record is written once, here.
        fresh: Whether to forget the folder's results first.
        times: Whether to time a step of each method. That alone differs each time: without it the same settings and
            seeds give the same table and report, byte for byte.
        observer: Hears of the progress; None stays silent.

    Returns:
        The results, as records, statistics, table and figures.

    Raises:
        ValueError: The settings make no sense for the task.
    """
    settings = Settings() if settings is None else settings
    observer = Observer() if observer is None else observer
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    directory = Path(out)
    if fresh:
        runs_file(directory).clear()
        step_times_file(directory).clear()
    try:
        observer.stage("preparing the task")
        task.prepare()
        records = sweep(task, settings, directory, jobs=jobs, executor=executor, observer=observer)
        measured: StepTimes = {}
        if times:
            observer.stage("timing the steps")
            measured = step_times(task, settings, directory)
    finally:
        observer.closed()
    save_manifest(directory, task.name, records, measured)
    return Comparison(task.name, directory, tuple(records), measured)


def load_comparison(directory: str | Path) -> Comparison:
    """Returns the last comparison that was finished in a folder, without its task and without training.

    Raises:
        NoComparisonError: There is none, or its records are gone.
    """
    directory = Path(directory)
    task, records, times = load_manifest(directory, runs_file(directory))
    return Comparison(task, directory, tuple(records), times)
