"""The documentation's formula for the bytes of a step is what the code sends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bodies import fsdp2, simulated
from costs import Pair, handed_over, llama_8b, plan_table
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("along", ["rank", "columns"])
@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_bytes_of_a_real_step(correction: str, along: str, size: int, pools: Pools) -> None:
    results = pools[size].run(fsdp2.collectives, correction, 3, along)
    for process, (calls, _) in enumerate(results):
        assert calls == handed_over([Pair(12, 8, 4)] * 3, correction, size, process, 4, along == "columns")


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("size", "process", "blocks"), [(1024, 0, 32), (1024, 15, 32), (8, 7, 1)])
def test_bytes_of_a_step_on_a_thousand_processes(size: int, process: int, blocks: int, columns: bool) -> None:
    """The code runs with the shapes of Llama 3 8B, in one process that takes itself for one of so many."""
    pairs = llama_8b(16)[: 7 * blocks]
    calls = simulated.collectives(pairs, "sds-split", size, process, torch.bfloat16, columns)
    assert calls == handed_over(pairs, "sds-split", size, process, 2, columns)


def test_the_documentation_prints_the_plan() -> None:
    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    assert plan_table() in page.read_text(encoding="utf8")
