"""A bound on the memory that is computed with at a time."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

# Of the whole process: torch.compile does not trace what is a thread's or a context's own. Where two threads step at
# once, one may compute in the other's parts, with the same result.
_bound: int | None = None


@contextmanager
def limited_workspace(max_bytes: int | None) -> Generator[None]:
    """Makes products convert less at a time inside, if need be; None leaves them as they are."""
    global _bound
    outside = _bound
    _bound = max_bytes
    try:
        yield
    finally:
        _bound = outside


def part_bytes(usual: int) -> int:
    """Returns how many bytes of a long tensor to convert at once, if the usual number is not too many."""
    # A part, its product, and one of the two in the tensor's own dtype.
    return usual if _bound is None else min(usual, _bound // 4)
