"""Several processes, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

import distributed_workers as workers
from toy import Network


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_ddp_equals_one_process_on_the_whole_batch(correction: str, tmp_path: Path) -> None:
    multiprocessing.spawn(workers.ddp, (2, str(tmp_path), correction), nprocs=2)
    alone = Network(dtype=torch.float64)
    workers.train(alone, workers.optimizer_of(alone, correction))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, expected in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-9)


def test_sharded_factors_are_refused(tmp_path: Path) -> None:
    multiprocessing.spawn(workers.fsdp2, (2, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        assert "first[default] are DTensors, sharded by FSDP2" in (tmp_path / f"{rank}.txt").read_text()
