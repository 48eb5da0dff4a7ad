"""Which engine, correction and dtype go together: what tests/distributed/test_table.py runs and the docs print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bodies import accelerated, common, ddp, deepspeeded, fsdp2, tensor_parallel
from bodies.common import Case

CORRECTIONS = ("sds", "sds-split", "scaled")
DTYPES = (torch.float32, torch.bfloat16)
STEPS = {torch.float32: 5, torch.bfloat16: 3}

# ‖found - expected‖ / ‖expected - uncorrected‖ over all LoRA factors: how far a run may be from one process, measured
# by what the correction does.
# Measured: 1e-6 and 3e-2; with tensor parallelism, which also adds up activations in another order, 9e-6 and 7e-2.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Engine:
    """How several processes train, and what one process does instead.

    Attributes:
        name: As in the documentation's table.
        processes: How many.
        training: The body; gets a case and `arguments`, returns the trained parameters.
        alone: The same in one process.
        arguments: Further arguments of `training`.
        on_llama: Whether both also get the folder of a saved Llama.
        looser: By which to multiply the tolerance in float32, and in bfloat16.
        hooks: Whether it corrects in backward, so that what maps updates is refused.
    """

    name: str
    processes: int
    training: Callable[..., Any]
    alone: Callable[..., Any] = common.alone
    arguments: tuple[Any, ...] = ()
    on_llama: bool = False
    looser: tuple[float, float] = (1, 1)
    hooks: bool = False


ENGINES = (
    Engine("DDP", 2, ddp.training),
    Engine("FSDP2", 4, fsdp2.training),
    Engine("FSDP2, Accelerate", 2, accelerated.training),
    Engine("TP", 2, tensor_parallel.llama_training, tensor_parallel.llama_training, on_llama=True, looser=(10, 2)),
    Engine("FSDP2 × TP", 4, tensor_parallel.mesh_training),
    *(
        Engine(f"DeepSpeed ZeRO-{stage}", 2, deepspeeded.training, deepspeeded.alone, (stage,), hooks=True)
        for stage in (1, 2, 3)
    ),
)


@dataclass(frozen=True)
class Cell:
    engine: Engine
    correction: str
    dtype: torch.dtype

    @property
    def refused(self) -> bool:
        return self.engine.hooks and self.correction == "sds-split"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype] * self.engine.looser[DTYPES.index(self.dtype)]

    @property
    def case(self) -> Case:
        return Case(self.correction, self.dtype, STEPS[self.dtype])

    def __str__(self) -> str:
        return f"{self.engine.name}, {self.correction}, {str(self.dtype).removeprefix('torch.')}"


CELLS = tuple(Cell(engine, correction, dtype) for engine in ENGINES for dtype in DTYPES for correction in CORRECTIONS)


def table() -> str:
    """The documentation's table."""
    names = [f"`{correction}` {name}" for name in ("fp32", "bf16") for correction in CORRECTIONS]
    lines = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for engine in ENGINES:
        cells = [cell for cell in CELLS if cell.engine is engine]
        entries = ("refused" if cell.refused else f"{cell.tolerance:g}" for cell in cells)
        lines.append(f"| {engine.name} ({'hooks' if engine.hooks else 'wrapper'}) | {' | '.join(entries)} |")
    return "\n".join(lines)
