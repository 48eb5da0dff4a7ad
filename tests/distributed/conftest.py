"""Process groups that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bodies import tensor_parallel
from packages import package
from process_pool import ProcessPool


@pytest.fixture(scope="session")
def pools() -> Iterator[dict[int, ProcessPool]]:
    """One, two and four processes; started when first used."""
    pools = {size: ProcessPool(size) for size in (1, 2, 4)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama."""
    package("transformers")
    folder = tmp_path_factory.mktemp("llama")
    tensor_parallel.save_llama(str(folder))
    return folder
