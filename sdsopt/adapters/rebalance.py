"""Writes an adapter anew, with the same ΔW in balanced factors."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Literal, final

from torch import Tensor

from sdsopt.adapters.adapter import Adapter, open_adapter
from sdsopt.adapters.balancing import Balanced, balance_svd, is_block_diagonal, relative_change, rounding_bound
from sdsopt.adapters.layers import AdapterLayer
from sdsopt.adapters.publish import check_target, published
from sdsopt.adapters.source import Source, member
from sdsopt.diagnostics import product_norm
from sdsopt.errors import AdapterError
from sdsopt.pairs import Skipped

_METHODS: dict[str, Callable[[Tensor, Tensor], Balanced]] = {"svd": balance_svd}

# Moments belong to the factors that they were gathered for: on new ones they would steer wrongly.
_OPTIMIZER_FILES = frozenset({"optimizer.pt", "optimizer.bin"})


class LayerChange(str, Enum):
    """What became of a layer."""

    BALANCED = "balanced"
    """It has new factors of the same product."""
    ZERO = "zero"
    """ΔW = 0, so that it was left as it is, for training to start from."""
    ADALORA = "adalora"
    """AdaLoRA keeps singular values of its own between the factors; it was left as it is."""
    BLOCK_DIAGONAL = "block_diagonal"
    """B is several matrices on a diagonal, which a loader may take apart; it was left as it is."""


@final
@dataclass(frozen=True)
class RebalancedLayer:
    """What became of one layer.

    Attributes:
        name: The layer's name.
        change: What was done.
        error: ‖ΔW' − ΔW‖_F / ‖ΔW‖_F as written, in the factors' dtype.
    """

    name: str
    change: LayerChange
    error: float


@final
@dataclass(frozen=True)
class RebalanceReport:
    """What `rebalance_adapter` did.

    Attributes:
        path: What was written.
        layers: The LoRA layers.
        skipped: What is no product B·A and was kept as it is, with the reason.
        left_out: Files and folders of the source that were not copied.
    """

    path: Path
    layers: tuple[RebalancedLayer, ...]
    skipped: tuple[Skipped, ...]
    left_out: tuple[str, ...]

    def count(self, change: LayerChange) -> int:
        """Returns the number of layers of which this became."""
        return sum(layer.change is change for layer in self.layers)

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer's ΔW."""
        return max((layer.error for layer in self.layers), default=0.0)


def rebalance_adapter(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    method: Literal["svd"] = "svd",
    force: bool = False,
    allow_pickle: bool = False,
) -> RebalanceReport:
    """Writes an adapter anew with the same ΔW = s·B·A in factors of equal norm and the least condition number.

    With B·A = U·Σ·Vᵀ, A becomes √Σ·Vᵀ and B becomes U·√Σ: both have the condition number √κ(ΔW). All else stays as it
    is, byte by byte: other tensors (DoRA's magnitudes, biases, heads), dtypes, metadata, names, and the other files of
    the folder. Only an optimizer's state is left out, which belongs to the old factors.

    The relative error of each ΔW is below 1e-6 in float32. In float16 and bfloat16 the factors are rounded to their
    dtype, which costs up to 2u·r^(1/4): about 0.1 % and 0.8 % at r = 1, twice that at r = 16.

    Args:
        source: As in `inspect_adapter`.
        target: A folder for a folder and a file for a file, in a folder that exists. It appears in one step when it is
            complete. It may be the source itself, with `force`.
        method: How the product is split; "svd" is the only one.
        force: Whether to replace what is at `target`; other files there are never removed.
        allow_pickle: Whether a pickle may be loaded, with `weights_only=True`; it is written as a pickle again.

    Returns:
        What was done.

    Raises:
        AdapterError: As in `inspect_adapter`; a factor holds NaN, there is nothing to balance, rounding would change a
            ΔW by more than the bound, or the target cannot be written to. Nothing was written.
        MissingExtraError: safetensors is not installed.
        ValueError: There is no such method.
    """
    if method not in _METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(_METHODS)}")
    adapter = open_adapter(source, allow_pickle=allow_pickle)
    files, destination = adapter.source, Path(os.path.realpath(target))
    kept, left_out = _other_files(files)
    is_folder = files.path.is_dir()
    names = {path.name for path in kept} | {file.path.name for file in files.files} if is_folder else None
    check_target(files.path, destination, names, force=force)
    if not adapter.layers:
        reasons = "; ".join(dict.fromkeys(item.reason for item in adapter.skipped))
        raise AdapterError(f"{source} has no layer to balance: {reasons}")

    layers: list[RebalancedLayer] = []
    replaced: dict[str, Tensor] = {}
    for layer in adapter.layers:
        change, tensors = _balance(adapter, layer, _METHODS[method])
        layers.append(change)
        replaced |= tensors
    with published(destination, folder=is_folder) as temporary:
        for path in kept:
            shutil.copy2(path, temporary / path.name)
        for file in files.files:
            written = temporary / file.path.name if is_folder else temporary
            file.write(written, {name: tensor for name, tensor in replaced.items() if name in file.tensors})
            shutil.copymode(file.path, written)
        if is_folder:
            shutil.copymode(files.path, temporary)
    return RebalanceReport(destination, tuple(layers), adapter.skipped, tuple(left_out))


def _balance(
    adapter: Adapter, layer: AdapterLayer, method: Callable[[Tensor, Tensor], Balanced]
) -> tuple[RebalancedLayer, dict[str, Tensor]]:
    """Returns what became of a layer, and its new tensors by name."""
    A, B, E = adapter.read(layer)
    where = f"{adapter.source.path}: {layer.name!r:.200}"
    if not (A.isfinite().all() and B.isfinite().all()):
        raise AdapterError(
            f"{where} holds NaN or infinity; the adapter is broken, take an earlier checkpoint (sdsopt inspect "
            "lists all such layers)"
        )
    if (kept := _why_kept(A, B, E)) is not None:
        return RebalancedLayer(layer.name, kept, 0.0), {}
    balanced = method(A, B)
    new_A, new_B = balanced.A.to(A.dtype), balanced.B.to(B.dtype)
    error = relative_change(A, B, new_A, new_B)
    if not error <= rounding_bound(balanced.singular_values, (A.dtype, B.dtype)):
        raise AdapterError(
            f"{where}: balanced factors are out of the range of {str(A.dtype).removeprefix('torch.')}, which would "
            f"change ΔW by {error:.1%}; convert the adapter to float32 first"
        )
    names, owners = layer.tensors, adapter.source.owners
    shape_A, shape_B = (owners[name].tensors[name].shape for name in (names.A, names.B))
    tensors = {names.A: layer.blocks.join_A(new_A, shape_A), names.B: layer.blocks.join_B(new_B, shape_B)}
    return RebalancedLayer(layer.name, LayerChange.BALANCED, error), tensors


def _why_kept(A: Tensor, B: Tensor, E: Tensor | None) -> LayerChange | None:
    if E is not None:
        return LayerChange.ADALORA
    if is_block_diagonal(B):
        return LayerChange.BLOCK_DIAGONAL
    return None if product_norm(A, B).any() else LayerChange.ZERO


def _other_files(source: Source) -> tuple[list[Path], list[str]]:
    """Returns the files of the folder to copy, and the names of what is left out."""
    if not source.path.is_dir():
        return [], []
    tensors = {file.path.name for file in source.files}
    kept: list[Path] = []
    left_out: list[str] = []
    for path in sorted(source.path.iterdir()):
        if path.name in tensors:
            continue
        if path.is_dir() or path.name in _OPTIMIZER_FILES:
            left_out.append(path.name)
        else:
            kept.append(member(source.path, path.name))
    return kept, left_out
