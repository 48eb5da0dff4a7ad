"""What is known of a finished run, and its form on disk."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

RunKey = tuple[Any, ...]
_TAIL = 5  # the final train loss is the mean over the last 1/5 of the steps


@dataclass(frozen=True)
class Record:
    """The result of one run. None stands where a number would not be finite.

    Attributes:
        fingerprint: The task and the versions that it ran with.
        key: `Run.key`.
        method, inner, lr, seed, rank, steps: As in `Run`.
        losses: Training loss before each step; shorter than `steps` where the run diverged.
        diverged: Whether the loss stopped being finite.
        accuracy: Held-out accuracy after the last step; None where the run diverged.
        kappa_steps: Steps at which condition numbers were taken; empty without adapters.
        kappa_A, kappa_B: Median condition number over the pairs; None while it is undefined, as for B = 0.
        spectrum_A, spectrum_B: Singular values of the factors after the last step: of each position, the median over
            the pairs. Empty without adapters, where the run diverged, and in records of earlier versions.
        spectrum_product: Those of ΔW = s·B·A.
        alignment_steps: Steps at which the alignment was taken; empty where no full gradient could be captured.
        alignment: Cosine between the full gradient and the direction in which an SGD step with the method's correction
            moves the product: the median over up to eight linear layers.
        seconds: Wall time of the run. Runs share the machine: not a measure of a method.
    """

    fingerprint: str
    key: RunKey
    method: str
    inner: str
    lr: float
    seed: int
    rank: int
    steps: int
    losses: tuple[float, ...]
    diverged: bool
    accuracy: float | None
    kappa_steps: tuple[int, ...]
    kappa_A: tuple[float | None, ...]
    kappa_B: tuple[float | None, ...]
    seconds: float
    spectrum_A: tuple[float, ...] = ()
    spectrum_B: tuple[float, ...] = ()
    spectrum_product: tuple[float, ...] = ()
    alignment_steps: tuple[int, ...] = ()
    alignment: tuple[float, ...] = ()

    def at_rank(self, rank: int) -> Record:
        """Returns the record as part of the comparison at that rank: full fine-tuning runs once for all of them."""
        return replace(self, rank=rank)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """Inverse of `to_json`, after a round trip through JSON.

        Raises:
            TypeError: The fields are not those of a record.
        """
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in data.items()}
        return cls(**fields)


def final_loss(record: Record) -> float:
    """Mean training loss over the last fifth of the steps; infinite where the run diverged."""
    return math.inf if record.diverged else fmean(record.losses[-max(1, record.steps // _TAIL) :])
