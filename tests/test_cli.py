"""The command line, as a person uses it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sdsopt
from sdsopt.cli import main

TASK = ["compare", "--task", "toy_task:Regression"]
SMALL = [*TASK, "--lrs", "0.05,0.1", "--steps", "12", "--seeds", "2", "--inner", "sgd", "--jobs", "1"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sdsopt {sdsopt.__version__}\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert main(["compare", "--help"]) == 0
    assert "--corrections" in capsys.readouterr().out


def test_compare_prints_a_table_and_names_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--corrections", "lora,sds", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"sds +0\.\d+", out)
    assert "12/12" in err or "timing the steps" in err
    for name in ("runs.jsonl", "loss_curves.png", "lr_sensitivity.png", "condition_numbers.png"):
        assert (tmp_path / name).exists()
        assert name in out.replace("\n", "")

    assert main([*SMALL, "--corrections", "lora,sds", "--out", str(tmp_path), "--quiet", "--no-full"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "full" not in [line.split()[0] for line in out.splitlines() if line.split()]


def test_resuming_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main([*SMALL, "--corrections", "lora", "--out", str(tmp_path)]) == 0
    assert "8 of 8 runs are on disk already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["compare", "--corrections", "sdss"], "unknown correction 'sdss'; known: lora, sds, sds-split, scaled"),
        (["compare", "--inner", "lion"], "unknown inner optimizer 'lion'; known: adamw, sgd"),
        (["compare", "--lrs", "-1"], "learning rates must be positive"),
        (["compare", "--lrs", "a"], "--lrs"),
        (["compare", "--seeds", "0"], "at least one seed"),
        (["compare", "--steps", "0"], "steps must be at least 1"),
        (["compare", "--jobs", "0"], "--jobs must be at least 1"),
        (["compare", "--task", "nothing"], "'digits' or package.module:Task"),
        (["compare", "--task", "no_such_module:Task"], "no module 'no_such_module'"),
        (["compare", "--task", "toy_task:Nothing"], "toy_task has no 'Nothing'"),
        (["compare", "--task", "toy_task:Dense"], "is not a sdsopt.compare.Task"),
    ],
)
def test_mistakes_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*SMALL, "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("sdsopt: error: ")


def test_ctrl_c_leaves_finished_runs_and_says_how_to_resume(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sdsopt", *TASK, "--lrs", "0.05,0.1", "--steps", "400", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([*command, "--jobs", "2"], stderr=subprocess.PIPE, text=True, env=environment)
    runs = tmp_path / "runs.jsonl"
    deadline = time.monotonic() + 120
    while not (runs.exists() and runs.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"finished runs are in {tmp_path}, the same command resumes" in err
    assert "Traceback" not in err
    assert 1 <= len(runs.read_text().splitlines()) < 60
