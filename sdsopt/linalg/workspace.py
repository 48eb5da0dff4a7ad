"""A bound on the memory that is computed with at a time."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager

from torch.compiler import is_compiling


class _Bound:
    max_bytes: int | None = None


class _BoundOfThread(threading.local, _Bound):
    pass


_of_thread = _BoundOfThread()
_while_compiling = _Bound()  # torch.compile does not trace what is a thread's own


@contextmanager
def limited_workspace(max_bytes: int | None) -> Generator[None]:
    """Makes products convert less at a time inside, if need be; None leaves them as they are."""
    bound = _bound()
    outside = bound.max_bytes
    bound.max_bytes = max_bytes
    try:
        yield
    finally:
        bound.max_bytes = outside


def part_bytes(usual: int) -> int:
    """Returns how many bytes of a long tensor to convert at once, if the usual number is not too many."""
    # A part, its product, and one of the two in the tensor's own dtype.
    max_bytes = _bound().max_bytes
    return usual if max_bytes is None else min(usual, max_bytes // 4)


def _bound() -> _Bound:
    return _while_compiling if is_compiling() else _of_thread
