"""Microsoft's loralib, its many copies, and AdapterHub: bare parameters `lora_A` and `lora_B` on the layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

from torch import nn

from sdsopt.pairs.attributes import own_parameter
from sdsopt.pairs.blocks import Groups
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.pair import LoRAPair


@final
class LoralibLayout(Layout):
    """A (r·g, n) and B (m_1 + … + m_g, r) in g groups of one length, with g > 1 in merged projections.

    A loralib convolution reshapes B·A into its kernel, so its rank is r times the kernel's width.
    """

    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        A, B = own_parameter(module, "lora_A"), own_parameter(module, "lora_B")
        if not isinstance(vars(module).get("scaling"), int | float):
            return
        if A is None or B is None:
            # AdapterHub's (IA)³ and VeRA modules say how their parameters act on a weight.
            if "composition_mode" in vars(module):
                yield Skipped(name, f"AdapterHub's {type(module).__name__} is not a plain product B·A")
            return
        if B.ndim > 2:
            yield Skipped(name, "several B share one A, as in MTL-LoRA")
            return
        # An integer factor: A holds one block of B's rank for each projection that is adapted.
        groups = max(A.shape[0] // B.shape[1], 1) if A.ndim == B.ndim == 2 and B.shape[1] else 1
        yield LoRAPair(name, module, "default", "lora_A", "lora_B", Groups(groups), _scaling)


def _scaling(module: Any) -> float:
    return module.scaling
