"""Processes of this machine, side by side: they end with the work, however that ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def processes(
    jobs: int, set_up: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Generator[ProcessPoolExecutor]:
    """Opens a pool of processes. An exception inside ends what they are doing; without one, they are waited for.

    Args:
        jobs: Their number.
        set_up: Called once in each of them.
        arguments: Its arguments.

    Yields:
        The pool.
    """
    # Not fork: torch's thread pools do not survive it.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, context, _start, (set_up, arguments))
    try:
        yield pool
    except BaseException:
        # Nothing of a half-done piece is kept, so there is nothing to wait for.
        workers = set(multiprocessing.active_children()) - others
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


def spread(function: Callable[[T], R], arguments: Iterable[T], jobs: int) -> list[R]:
    """Returns the function's result for each argument, in order; computed in this process where `jobs` is 1."""
    if jobs == 1:
        return [function(argument) for argument in arguments]
    with processes(jobs) as pool:
        return list(pool.map(function, arguments))


def _start(set_up: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if set_up is not None:
        set_up(*arguments)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # a killed parent cannot end its workers, and they would wait for work forever
        os._exit(1)
