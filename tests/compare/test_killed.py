"""A sweep that is killed and resumed ends as one that never stopped, byte for byte."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdsopt.cli import main

# 36 runs, and 6 more by which the grids grow. Step times are measured, and no two sweeps share them.
SWEEP = ["compare", "--task", "toy_task:Regression", "--inner", "sgd", "--corrections", "lora,sds", "--ranks", "3"]
SWEEP += ["--seeds", "2", "--steps", "80", "--widen", "1", "--no-times", "--quiet", "--jobs", "1"]
TESTS = Path(__file__).parents[1]


def lines(folder: Path) -> list[bytes]:
    store = folder / "runs.jsonl"
    return store.read_bytes().splitlines(keepends=True) if store.exists() else []


def outputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, bytes]:
    """All files but the runs, which lie in the order they finished in, and what is printed."""
    capsys.readouterr()
    assert main(["compare", "report", str(folder), "--json"]) == 0
    printed = capsys.readouterr().out.encode()
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "runs.jsonl"} | {"json": printed}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert main([*SWEEP, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "sdsopt", *SWEEP, "--out", str(folder)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while len(lines(folder)) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    return folder


@pytest.mark.parametrize("torn", [False, True])
def test_killed_and_resumed(
    torn: bool, whole: Path, killed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(killed, folder)
    found = lines(folder)
    assert 3 <= len(found) < len(lines(whole))
    assert [path.name for path in folder.iterdir()] == ["runs.jsonl"]  # no table of half a sweep
    if torn:  # the power went out while the last line was written
        (folder / "runs.jsonl").write_bytes(b"".join(found)[: -len(found[-1]) // 2])

    assert main([*SWEEP, "--out", str(folder)]) == 0
    expected = outputs(whole, capsys)
    assert {"report.html", "table.md", "lr_sensitivity.png", "comparison.json", "json"} <= expected.keys()
    assert outputs(folder, capsys) == expected
    assert len(lines(folder)) == len(lines(whole)) + torn  # nothing was run twice but what was torn
