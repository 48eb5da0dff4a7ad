"""A bound on memory holds where it was set, and nowhere else."""

from __future__ import annotations

import threading

from sdsopt.linalg import workspace
from sdsopt.linalg.workspace import part_bytes

USUAL = 1000


def test_bounds_nest() -> None:
    with workspace(400):
        assert part_bytes(USUAL) == 100
        with workspace(None):
            assert part_bytes(USUAL) == USUAL
        assert part_bytes(USUAL) == 100
    assert part_bytes(USUAL) == USUAL


def test_a_bound_is_its_threads_own() -> None:
    """Also when the threads leave it in the order in which they came."""
    inside, outside = threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        with workspace(400):
            inside.set()
            outside.wait()
            seen.append(part_bytes(USUAL))

    thread = threading.Thread(target=other)
    with workspace(800):
        thread.start()
        inside.wait()
        assert part_bytes(USUAL) == 200
    assert part_bytes(USUAL) == USUAL
    outside.set()
    thread.join()
    assert seen == [100]
    assert part_bytes(USUAL) == USUAL
