"""Runs on a real Dask cluster on loopback, of which a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sdsopt.cli import main
from sdsopt.compare import Observer, Record, Settings, compare
from toy_task import Regression

distributed = pytest.importorskip("distributed")

SETTINGS = Settings(corrections=("lora", "sds"), inner=("sgd",), lrs=(0.05, 0.1), seeds=(0, 1), ranks=(3,), steps=200)


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    # Workers import the task by name.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    ) as running:
        yield running


class KillsAWorker(Observer):
    """Kills one worker after the first record."""

    def __init__(self, client: object) -> None:
        self.client = client
        self.records: list[Record] = []

    def finished(self, record: Record) -> None:
        self.records.append(record)
        if len(self.records) == 1:
            pids = self.client.run(os.getpid)  # pyright: ignore
            os.kill(next(iter(pids.values())), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")  # Dask warns of the worker that it lost
def test_a_killed_worker_loses_and_doubles_no_run(cluster: object, tmp_path: Path) -> None:
    alone = compare(Regression(), SETTINGS, out=tmp_path / "alone")
    with distributed.Client(cluster) as client:
        observer = KillsAWorker(client)
        executor = client.get_executor(retries=3, pure=False)
        spread = compare(Regression(), SETTINGS, out=tmp_path / "dask", executor=executor, observer=observer)
    assert [replace(r, seconds=0) for r in spread.records] == [replace(r, seconds=0) for r in alone.records]
    keys = [record.key for record in observer.records]
    assert len(keys) == len(set(keys)) == len(alone.records)
    assert len((tmp_path / "dask" / "runs.jsonl").read_text().splitlines()) == len(keys)


def test_by_its_address(cluster: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--lrs", "0.05,0.1", "--steps", "12", "--seeds", "2", "--inner", "sgd", "--corrections", "lora"]
    address = cluster.scheduler_address  # pyright: ignore
    assert main(["compare", "--task", "toy_task:Regression", *small, "--out", str(tmp_path), "--dask", address]) == 0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8
    assert "lora" in capsys.readouterr().out
