"""Default learning rates: one table of centres, one spacing, equally many for every method."""

from __future__ import annotations

from collections.abc import Sequence

# Preconditioned steps are longer, so their grids lie lower; measured on the embedded task and on a small GPT.
_CENTRES = {
    ("adamw", "full"): 2e-3,
    ("adamw", "lora"): 1e-2,
    ("adamw", "sds"): 1e-2,
    ("adamw", "sds-split"): 4e-3,
    ("adamw", "scaled"): 1e-2,
    ("sgd", "full"): 0.1,
    ("sgd", "lora"): 0.3,
    ("sgd", "sds"): 0.1,
    ("sgd", "sds-split"): 0.03,
    ("sgd", "scaled"): 0.03,
}


def log_grid(centre: float, count: int, factor: float) -> tuple[float, ...]:
    """Returns `count` rates around `centre`, each `factor` times the one before."""
    # Three digits: rates are part of a run's identity on disk and are read by people.
    return tuple(float(f"{centre * factor ** (i - (count - 1) / 2):.3g}") for i in range(count))


def default_learning_rates(inner: str, method: str, count: int = 6, factor: float = 2.0) -> Sequence[float]:
    """Returns the default grid; one that the table does not know is swept around the rates of `sds`.

    Raises:
        ValueError: Nothing is known of the inner optimizer.
    """
    centre = _CENTRES.get((inner, method)) or _CENTRES.get((inner, "sds"))
    if centre is None:
        raise ValueError(f"no default learning rates for the inner optimizer {inner!r}: name them (lrs)")
    return log_grid(centre, count, factor)
