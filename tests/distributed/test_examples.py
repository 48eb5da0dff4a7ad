"""The examples run as the documentation says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from packages import package

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "distributed"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
LAUNCHED = str(ROOT / "tests" / "launched.py")


def losses(*command: str) -> tuple[list[float], str]:
    """Runs it with this Python; returns the losses that it printed, and all of its output."""
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, timeout=150, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"processes, .*loss ([\d.]+)", run.stdout)], run.stdout


def test_fsdp2_goes_on_with_other_processes(tmp_path: Path) -> None:
    package("peft")
    script = [str(EXAMPLES / "fsdp2.py"), "--checkpoint", str(tmp_path / "run")]
    (first, middle), _ = losses(*TORCHRUN, "--nproc-per-node", "2", *script)
    (resumed, last), output = losses(*TORCHRUN, "--nproc-per-node", "1", *script)
    assert "1 processes" in output
    assert middle < 0.9 * first
    assert abs(resumed - middle) < 0.1 * (first - middle)
    assert last < resumed


def test_accelerate_launches_fsdp2() -> None:
    package("accelerate")
    config = str(EXAMPLES / "fsdp2.yaml")
    launch = ["-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    (first, last), output = losses(*launch, LAUNCHED, "accelerated")
    assert "2 processes, FSDP" in output
    assert last < 0.9 * first


def test_accelerate_on_cpus() -> None:
    package("accelerate")
    (first, last), output = losses(*TORCHRUN, "--nproc-per-node", "2", str(EXAMPLES / "accelerated.py"))
    assert "2 processes, MULTI_CPU" in output
    assert last < 0.9 * first


def test_deepspeed_zero_3() -> None:
    package("deepspeed")
    (first, last), output = losses(*TORCHRUN, "--nproc-per-node", "2", LAUNCHED, "zero", "--stage", "3")
    assert "2 processes, ZeRO-3" in output
    assert last < 0.9 * first


def test_the_documentation_names_every_example() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf8")
    files = [path for path in EXAMPLES.iterdir() if path.is_file()]
    assert files
    for path in files:
        assert f"examples/distributed/{path.name}" in page
