"""Where runs are computed: in this process, in several, or in an engine that speaks `concurrent.futures`."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed

from sdsopt.compare.grid import Run
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
    # Not fork: torch's thread pools do not survive it.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(task,))
    try:
        futures: list[Future[Record]] = [pool.submit(_train_here, run, fingerprint) for run in runs]
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        # Nothing of a half-done run is kept, so there is nothing to wait for.
        workers = set(multiprocessing.active_children()) - others
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


_worker_task: Task | None = None


def _start_worker(task: Task) -> None:
    global _worker_task
    _worker_task = task  # once per process, not per run: a task may carry data
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent cannot end its workers, and they would wait for work forever
        os._exit(1)


def _train_here(run: Run, fingerprint: str) -> Record:
    assert _worker_task is not None
    return train(_worker_task, run, fingerprint)
