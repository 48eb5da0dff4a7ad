"""What goes wrong in one process, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bodies import checkpoints, faults
from bodies.common import Case, State
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


def assert_close(states: list[State], expected: State) -> None:
    for state in states:
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_a_process_killed_in_a_step_loses_nothing_since_the_checkpoint(correction: str, tmp_path: Path) -> None:
    pool, folder = ProcessPool(2), str(tmp_path / "saved")
    case = Case(correction, steps=3)
    with pytest.raises(AssertionError, match="process 1 died"):
        pool.run(faults.killed_in_a_step, case, folder)
    resumed = pool.run(checkpoints.part_of_a_run, case, case.steps, folder, None)
    uninterrupted = pool.run(checkpoints.part_of_a_run, Case(correction, steps=6), 0, None, None)
    pool.close()
    for (_, end), (_, expected) in zip(resumed, uninterrupted, strict=True):
        assert end.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(end[name], tensor), name


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_all_processes_skip_when_one_overflows(how: str, correction: str, pools: Pools) -> None:
    results = pools[2].run(faults.overflow_in_one_process, Case(correction), how)
    for result in results:
        assert result["moved"] == [False, True]
        assert result["scale"] == 128.0
        for name, tensor in results[0]["state"].items():
            assert tensor.isfinite().all()
            assert torch.equal(result["state"][name], tensor)


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_an_adapter_that_one_replica_does_not_run(correction: str, pools: Pools) -> None:
    assert_close(pools[2].run(faults.branches, Case(correction)), faults.branches(Case(correction)))


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_a_correction_that_draws_stays_in_step(how: str, pools: Pools) -> None:
    """Of sharded factors it gets whole ones, since it does not say that it works row by row."""
    assert_close(pools[2].run(faults.noisy, how), faults.noisy("alone"))
