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
    multiprocessing.spawn(workers.run, (2, str(tmp_path), workers.ddp, correction), nprocs=2)
    alone = Network(dtype=torch.float64)
    workers.train(alone, workers.optimizer_of(alone, correction))
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, expected in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-6, atol=1e-9)


def test_sharded_factors_are_refused(tmp_path: Path) -> None:
    multiprocessing.spawn(workers.run, (2, str(tmp_path), workers.fsdp2), nprocs=2)
    for rank in (0, 1):
        wrapped, attached = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert "first[default] are DTensors, sharded by FSDP2" in wrapped
        assert attached == wrapped
