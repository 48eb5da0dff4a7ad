"""Runs an example under its launcher, with what a machine without GPUs lacks: `launched.py example arguments…`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples" / "distributed"


def accelerated() -> None:
    """Tells Accelerate that there are GPUs: it offers FSDP on nothing else."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def zero() -> None:
    """Keeps DeepSpeed from compiling its shared-memory collectives, for minutes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()


if __name__ == "__main__":
    example, *arguments = sys.argv[1:]
    {"accelerated": accelerated, "zero": zero}[example]()
    sys.argv = [example, *arguments]
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
