"""The command line, as a person uses it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
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


@pytest.mark.parametrize("command", ["compare", "completion", "inspect", "rebalance", "bench"])
def test_every_commands_help_has_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  sdsopt {command} " in out.partition("examples:")[2].partition("exit codes:")[0]
    assert "130" in out.partition("exit codes:")[2]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    for word in ("compare", "--corrections", "completion"):
        assert word.lstrip("-") in out


def test_bash_completes() -> None:
    """In a real shell: `sdsopt com<Tab>`."""
    script = (
        'eval "$(python -m sdsopt completion bash)"; COMP_WORDS=(sdsopt comp); COMP_CWORD=1; '
        '$(complete -p sdsopt | sed "s/.*-F \\([^ ]*\\).*/\\1/") sdsopt comp sdsopt; echo "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.split() == ["compare", "completion"], run.stderr


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "sdsopt", "completion", "bash"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b""
    assert process.returncode == 1


def test_json_is_one_document_of_plain_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert main([*SMALL, "--corrections", "lora,sds", "--out", str(tmp_path), "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out, parse_constant=refuse)
    assert err == ""
    assert [row["method"] for row in results["methods"]] == ["full", "lora", "sds"]
    for row in results["methods"]:
        best = min(row["learning_rates"], key=lambda cell: cell["mean"])
        assert row["best_lr"] == best["lr"] and row["train_loss"]["mean"] == best["mean"]
        assert best["count"] == 2


def test_compare_prints_a_table_and_names_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--corrections", "lora,sds", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"sds +0\.\d+", out)
    assert "12/12" in err or "timing the steps" in err
    for name in ("report.html", "table.md", "loss_curves.png", "lr_sensitivity.png", "condition_numbers.png"):
        assert (tmp_path / name).exists()
        assert name in out.replace("\n", "")

    assert main([*SMALL, "--corrections", "lora,sds", "--out", str(tmp_path), "--quiet", "--no-full"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "full" not in [line.split()[0] for line in out.splitlines() if line.split()]


def test_a_report_is_made_again_without_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--corrections", "lora,sds", "--out", str(tmp_path), "--quiet"]) == 0
    table = capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".html", ".md")}
    for name in first:
        (tmp_path / name).unlink()
    assert main(["compare", "report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == table
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name in first} == first

    (tmp_path / "runs.jsonl").write_text("")
    assert main(["compare", "report", str(tmp_path)]) == 1
    assert "12 of the 12 runs" in capsys.readouterr().err


def test_a_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "report", str(tmp_path)]) == 1
    assert f"{tmp_path} holds no finished comparison" in capsys.readouterr().err


def test_resuming_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main([*SMALL, "--corrections", "lora", "--out", str(tmp_path)]) == 0
    assert "8 of 8 runs are on disk already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["compare", "--corrections", "sdss"], "unknown correction 'sdss'; known: lora, sds, sds-split, scaled"),
        (["compare", "--corrections", "sdss"], "lora-rite-matrix, sds-paper"),
        (["compare", "--inner", "lion"], "unknown inner optimizer 'lion'; known: adamw, sgd"),
        (["compare", "--lrs", "-1"], "learning rates must be positive"),
        (["compare", "--lrs", "a"], "--lrs"),
        (["compare", "--seeds", "0"], "at least one seed"),
        (["compare", "--steps", "0"], "steps must be at least 1"),
        (["compare", "--jobs", "0"], "--jobs must be at least 1"),
        (["compare", "--task", "nothing"], "sensing or package.module:Task"),
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
    # A shell starts what it puts in the background, this suite perhaps, with Ctrl-C ignored.
    process = subprocess.Popen(
        [*command, "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
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
