"""Default learning rates: one table of grids' starts, one spacing, equally many for every method."""

from __future__ import annotations

from collections.abc import Sequence

# Where the embedded task's best rates lie about the middle of the grid. A preconditioned step is longer.
_LOWEST = {
    ("adamw", "full"): 5e-4,
    ("adamw", "lora"): 1e-3,
    ("adamw", "sds"): 1e-3,
    ("adamw", "sds-split"): 5e-4,
    ("adamw", "scaled"): 1e-3,
    ("adamw", "sds-paper"): 5e-4,
    ("adamw", "lora-rite"): 5e-4,
    ("adamw", "lora-rite-matrix"): 5e-4,
    ("adamw", "lora-fa"): 4e-3,
    ("adamw", "lora-muon"): 1e-2,
    ("sgd", "full"): 4e-3,
    ("sgd", "lora"): 4e-3,
    ("sgd", "sds"): 2e-3,
    ("sgd", "sds-split"): 1e-3,
    ("sgd", "scaled"): 1e-4,
    ("sgd", "lora-pro"): 1e-4,
    ("sgd", "reflora"): 8e-3,
    ("sgd", "sds-paper"): 1e-3,
    ("sgd", "lora-rite"): 1e-3,
    ("sgd", "lora-rite-matrix"): 5e-5,
    ("sgd", "lora-fa"): 2e-2,
    ("sgd", "lora-muon"): 1e-2,
}


def log_grid(lowest: float, count: int, factor: float = 2.0) -> tuple[float, ...]:
    """Returns `count` rates from the lowest up, each `factor` times the one before."""
    # Three digits: rates are part of a run's identity on disk and are read by people.
    return tuple(float(f"{lowest * factor**i:.3g}") for i in range(count))


def default_learning_rates(inner: str, method: str, count: int = 6) -> Sequence[float]:
    """Returns the default grid; a method that the table does not know gets that of `sds`.

    Raises:
        ValueError: Nothing is known of the inner optimizer.
    """
    lowest = _LOWEST.get((inner, method)) or _LOWEST.get((inner, "sds"))
    if lowest is None:
        raise ValueError(f"no default learning rates for the inner optimizer {inner!r}: name them (lrs)")
    return log_grid(lowest, count)
