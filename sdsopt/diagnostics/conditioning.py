"""Condition numbers of matrices, and of the factors of a model's LoRA pairs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import torch
from torch import Tensor

from sdsopt.diagnostics.spectrum import singular_values
from sdsopt.pairs import LoRAPair
from sdsopt.sharding import whole


def condition_number(values: Tensor) -> Tensor:
    """Returns κ = σmax / σmin.

    Args:
        values: Singular values (..., k) with k ≥ 1, largest first.

    Returns:
        (...), at least 1; infinite for a rank-deficient matrix, that is where σmin is below the rounding of σmax; NaN
        for a zero matrix and where a value is NaN.
    """
    largest, smallest = values[..., 0], values[..., -1]
    rounding = torch.finfo(values.dtype).eps * values.shape[-1]
    kappa = (largest / smallest).masked_fill(smallest <= rounding * largest, torch.inf)
    return kappa.masked_fill(largest == 0, torch.nan)


@torch.no_grad()
def median_condition_numbers(pairs: Sequence[LoRAPair]) -> tuple[float | None, float | None]:
    """Returns the median over all pairs of κ(A) and of κ(B); None where no pair has a finite one, as for B = 0.

    Factors that DeepSpeed ZeRO-3 has taken away for the moment are passed over.
    """
    return (
        _median_kappa(pair.split_A(A) for pair in pairs if (A := whole(pair.A)).numel()),
        _median_kappa(pair.split_B(B) for pair in pairs if (B := whole(pair.B)).numel()),
    )


def _median_kappa(factors: Iterable[Tensor]) -> float | None:
    # In fp32, everything beyond κ = 1e7 is rounding noise. Not every device has float64.
    kappas = [condition_number(singular_values(factor.to("cpu"))) for factor in factors]  # (e,) each
    finite = [kappa for batch in kappas for kappa in batch[batch.isfinite()].tolist()]
    return median(finite) if finite else None
