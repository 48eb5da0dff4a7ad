"""Measures the layers of an adapter on disk."""

from __future__ import annotations

import math
import os
import re
from statistics import median

from torch import Tensor

from sdsopt.adapters.adapter import StoredFactors, open_adapter
from sdsopt.adapters.layers import AdapterLayer
from sdsopt.adapters.report import AdapterReport, LayerReport, LayerStatus
from sdsopt.diagnostics import balance, condition_number, effective_rank, product_svd, singular_values, stable_rank
from sdsopt.diagnostics.names import name_fits
from sdsopt.errors import AdapterError


def inspect_adapter(
    path: str | os.PathLike[str], *, pattern: str | None = None, allow_pickle: bool = False
) -> AdapterReport:
    """Measures how well conditioned the factors of an adapter are. Nothing is written.

    Args:
        path: A PEFT adapter's folder, also sharded, or a Trainer's checkpoint folder; or a single file with names as
            PEFT, kohya or diffusers write them.
        pattern: Part of the names of the layers to measure, with shell wildcards; None for all.
        allow_pickle: Whether a pickle (`adapter_model.bin`, `.pt`, `.ckpt`) may be loaded, with `weights_only=True`.

    Returns:
        The measurements. Layers that hold NaN are among them, and marked.

    Raises:
        AdapterError: There is no adapter, a file is damaged, factors do not fit together, or no layer has such a name.
        MissingExtraError: safetensors is not installed.
    """
    adapter = open_adapter(path, allow_pickle=allow_pickle)
    layers = sorted(adapter.layers, key=lambda layer: _natural(layer.name))
    if pattern is not None and layers:
        layers = [layer for layer in layers if name_fits(layer.name, pattern)]
        if not layers:
            raise AdapterError(
                f"no LoRA layer of {path} is called {pattern!r}; the first is {adapter.layers[0].name!r:.200}, and "
                "the pattern may be any part of a name, with * and ?"
            )
    measured = tuple(measure(layer, adapter.read(layer)) for layer in layers)
    notes = tuple(dict.fromkeys(layer.note for layer in layers if layer.note))
    return AdapterReport(adapter.source.path, measured, adapter.skipped, notes)


def measure(layer: AdapterLayer, factors: StoredFactors) -> LayerReport:
    """Measures one layer, in float64."""
    A, B, E = (None if part is None else part.double() for part in factors)
    assert A is not None and B is not None
    # What a gradient passes through on its way to the other factor.
    seen_A, seen_B = (A, B) if E is None else (E[:, None] * A, B * E)
    svd = product_svd(seen_A, B)
    values = abs(layer.scaling) * svd.S  # (e, k)

    kappas_A, kappas_B = condition_number(singular_values(seen_A)), condition_number(singular_values(seen_B))
    status = LayerStatus.OK
    if values.isnan().any():
        status = LayerStatus.NOT_FINITE
    elif not values.any():
        status = LayerStatus.ZERO
    elif kappas_A.isinf().any() or kappas_B.isinf().any():
        status = LayerStatus.RANK_DEFICIENT
    used = (values[:, 0] != 0) | (status is LayerStatus.ZERO)  # (e,)

    def middle(per_block: Tensor) -> float:
        known = per_block[used & ~per_block.isnan()].tolist()
        return median(known) if known and status is not LayerStatus.NOT_FINITE else math.nan

    return LayerReport(
        layer.name,
        status,
        rank=A.shape[1],
        num_blocks=A.shape[0],
        scaling=layer.scaling,
        condition_A=middle(kappas_A),
        condition_B=middle(kappas_B),
        condition_delta=middle(condition_number(values)),
        sigma_max=values.amax().item(),
        effective_rank=middle(effective_rank(values)),
        stable_rank=middle(stable_rank(values)),
        balance=middle(balance(A, B)),
        singular_values=values.tolist(),
    )


def _natural(name: str) -> list[str | tuple[int, str]]:
    """Sorts layers.2 before layers.10. Texts and numbers alternate, so that like is compared with like."""
    parts = re.split(r"(\d+)", name)
    return [(len(part), part) if index % 2 else part for index, part in enumerate(parts)]
