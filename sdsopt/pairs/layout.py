"""The interface between `find_pairs` and the ways in which libraries keep LoRA factors in modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from sdsopt.pairs.pair import LoRAPair


@dataclass(frozen=True)
class Skipped:
    """Something that resembles a LoRA pair but is not treated as one.

    Attributes:
        name: Module path and adapter, as in `LoRAPair.name`.
        reason: Why it is left alone, as a phrase that can follow a colon.
    """

    name: str
    reason: str


class Layout(ABC):
    """One library's way of storing LoRA layers. A layout never imports that library."""

    @abstractmethod
    def inspect(self, name: str, module: nn.Module) -> Iterator[LoRAPair | Skipped]:
        """Yields what this one module holds itself, whether frozen or not; its children get their own call.

        Args:
            name: The module's path in the model; empty for the model itself.
            module: Any module of the model, except torch's own with no more than a weight and a bias. Nothing is
                yielded for one that this layout does not know.
        """
