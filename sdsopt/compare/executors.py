"""Where runs are computed: in this process, in several, or in an engine that speaks `concurrent.futures`."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future, as_completed

from sdsopt.compare.grid import Run
from sdsopt.compare.processes import processes
from sdsopt.compare.records import Record
from sdsopt.compare.task import Task
from sdsopt.compare.train import train


def run_all(
    task: Task, runs: Sequence[Run], fingerprint: str, jobs: int, executor: Executor | None = None
) -> Generator[Record]:
    """Yields the records of the runs as they finish, in any order.

    Closing the generator ends the runs in flight, or where an executor computes them, cancels those not begun.

    Args:
        task: A prepared task; picklable unless all stays in this process.
        runs: What to run.
        fingerprint: Copied into the records.
        jobs: Number of processes; 1 stays in this one.
        executor: Computes the runs instead.
    """
    if executor is not None:
        return _in_executor(task, runs, fingerprint, executor)
    jobs = min(jobs, len(runs))
    if jobs <= 1:
        return (train(task, run, fingerprint) for run in runs)
    return _in_processes(task, runs, fingerprint, jobs)


def _in_executor(task: Task, runs: Sequence[Run], fingerprint: str, executor: Executor) -> Generator[Record]:
    futures = [executor.submit(train, task, run, fingerprint) for run in runs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _in_processes(task: Task, runs: Sequence[Run], fingerprint: str, jobs: int) -> Generator[Record]:
    with processes(jobs, _keep, (task,)) as pool:
        futures: list[Future[Record]] = [pool.submit(_train_here, run, fingerprint) for run in runs]
        for future in as_completed(futures):
            yield future.result()


_worker_task: Task | None = None


def _keep(task: Task) -> None:
    global _worker_task
    _worker_task = task  # once per process, not per run: a task may carry data


def _train_here(run: Run, fingerprint: str) -> Record:
    assert _worker_task is not None
    return train(_worker_task, run, fingerprint)
