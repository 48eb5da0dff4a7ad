"""Condition numbers of the factors of a model's LoRA pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

import torch
from torch import Tensor

from sdsopt.pairs import LoRAPair


@torch.no_grad()
def median_condition_numbers(pairs: Sequence[LoRAPair]) -> tuple[float | None, float | None]:
    """Returns the median over all pairs of κ(A) and of κ(B); None where no pair has a finite one, as for B = 0."""
    return (
        _median_kappa(pair.split_A(pair.A) for pair in pairs),
        _median_kappa(pair.split_B(pair.B) for pair in pairs),
    )


def _median_kappa(factors: Iterable[Tensor]) -> float | None:
    kappas: list[float] = []
    for factor in factors:
        if not factor.isfinite().all():
            continue
        # In fp32, everything beyond κ = 1e7 is rounding noise.
        values = torch.linalg.svdvals(factor.detach().to("cpu", torch.float64))  # (e, r)
        kappas += [k for k in (values[:, 0] / values[:, -1]).tolist() if math.isfinite(k)]
    return median(kappas) if kappas else None
