"""An adapter on disk, opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple, final

from torch import Tensor

from sdsopt.adapters.layers import AdapterLayer, find_layers
from sdsopt.adapters.source import Source, open_source
from sdsopt.pairs import Skipped


class StoredFactors(NamedTuple):
    """The factors of one layer, in the dtype that they are stored in.

    Attributes:
        A: (e, r, n) with e blocks.
        B: (e, m, r).
        E: AdaLoRA's diagonal between them, (r,); None for a plain product.
    """

    A: Tensor
    B: Tensor
    E: Tensor | None


@final
@dataclass(frozen=True)
class Adapter:
    """The LoRA layers of an adapter, whose tensors are read when they are asked for.

    Attributes:
        source: Its files.
        layers: Its LoRA layers, in the order of the files.
        skipped: What resembles a LoRA layer but is no product B·A, and why.
    """

    source: Source
    layers: tuple[AdapterLayer, ...]
    skipped: tuple[Skipped, ...]

    def read(self, layer: AdapterLayer) -> StoredFactors:
        """Reads one layer's factors.

        Raises:
            AdapterError: They cannot be read.
        """
        names = layer.tensors
        A, B = (self.source.owners[name].read(name) for name in (names.A, names.B))
        E = None if names.E is None else self.source.owners[names.E].read(names.E).flatten()
        return StoredFactors(layer.blocks.split_A(A), layer.blocks.split_B(B), E)


def open_adapter(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Adapter:
    """Opens an adapter on disk; see `inspect_adapter` for what it can be, and what is raised."""
    source = open_source(path, allow_pickle=allow_pickle)
    layers, skipped = find_layers(source)
    return Adapter(source, tuple(layers), tuple(skipped))
