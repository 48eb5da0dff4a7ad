"""Measurements that do not depend on each other, side by side."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def spread(function: Callable[[T], R], arguments: Iterable[T], jobs: int) -> list[R]:
    """Returns the function's result for each argument, in order; computed in this process where `jobs` is 1."""
    if jobs == 1:
        return [function(argument) for argument in arguments]
    context = multiprocessing.get_context("spawn")  # torch's thread pools do not survive a fork
    with ProcessPoolExecutor(jobs, context) as pool:
        return list(pool.map(function, arguments))
