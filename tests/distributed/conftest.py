"""Process groups that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from process_pool import ProcessPool


@pytest.fixture(scope="session")
def two() -> Iterator[ProcessPool]:
    pool = ProcessPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four() -> Iterator[ProcessPool]:
    pool = ProcessPool(4)
    yield pool
    pool.close()
