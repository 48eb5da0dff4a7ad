"""What is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from sdsopt.bench.shapes import SHAPES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how long that may take.

    Attributes:
        shapes: Names of `SHAPES`.
        ranks: LoRA ranks r.
        dtypes: "float32", "bfloat16".
        device: Such as "cpu" or "cuda".
        rounds: How often everything is timed, in turn.
        clock: "wall", or on a CPU "cpu": the time of this process alone, which others on the machine change least.
        memory: GiB for parameters, gradients, optimizer states and corrected gradients; it limits the layers.
        peers: Whether other implementations are measured too.
        training_step: Whether a whole training step of a Llama block is measured too.
        growth: Whether the growth with pairs, rank and width is measured too.

    Raises:
        ValueError: A name is unknown, or a number is out of range.
    """

    shapes: Sequence[str] = ("llama-3-8b",)
    ranks: Sequence[int] = (16,)
    dtypes: Sequence[str] = ("float32",)
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    rounds: int = 9
    clock: Literal["wall", "cpu"] = "wall"
    memory: float = 2.0
    peers: bool = True
    training_step: bool = False
    growth: bool = False

    def __post_init__(self) -> None:
        _require_known("shape", self.shapes, SHAPES)
        _require_known("dtype", self.dtypes, DTYPES)
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks must be positive, got {list(self.ranks)}")
        if self.clock not in ("wall", "cpu") or (self.clock == "cpu" and not self.device.startswith("cpu")):
            raise ValueError(f'clock must be "wall", or on a CPU "cpu", got {self.clock!r} on {self.device}')
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if not self.memory > 0:
            raise ValueError(f"memory must be positive, got {self.memory}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
            raise ValueError(f"the device {self.device!r} cannot be used: {error}") from error


def _require_known(kind: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    if not names:
        raise ValueError(f"at least one {kind} is needed; known: {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
