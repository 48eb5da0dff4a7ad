"""Along which axes a matrix may be cut."""

from __future__ import annotations

from typing import NamedTuple


class Axes(NamedTuple):
    """What the axes of a stored factor mean for those who cut it. All others must be whole wherever it is used.

    Attributes:
        free: Axes on which nothing but rows of the tall factor lie. Cut there, each process holds some rows of every
            block: Gram matrices add up over the processes, and each multiplies its own rows by r×r matrices.
        batch: Axes of independent blocks. Cut there, each process holds some blocks, with all of their rows.
    """

    free: tuple[int, ...]
    batch: tuple[int, ...] = ()
