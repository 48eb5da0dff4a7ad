"""Where the two factors of a pair lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from sdsopt.engine.recipe import Recipe
from sdsopt.pairs import LoRAPair
from sdsopt.sharding import WHOLE, Distribution, is_distributed


class Places(NamedTuple):
    """Where A and B lie, and how to compute with them there."""

    A: Distribution = WHOLE
    B: Distribution = WHOLE

    @classmethod
    def of(cls, pair: LoRAPair, A: Tensor, B: Tensor, recipe: Recipe) -> Places:
        """Reads it off a pair's factors as they are now."""
        if not (is_distributed(A) or is_distributed(B)):
            return HERE
        both = cls(
            Distribution.of(A, pair.blocks.axes_A(A.ndim)),
            Distribution.of(B, pair.blocks.axes_B(B.ndim)),
        )
        # Blocks that are cut must meet their partners.
        if recipe.by_rows and both.A.batch == both.B.batch:
            return both
        return cls(both.A.whole(), both.B.whole())

    @property
    def are_whole(self) -> bool:
        """Whether one computes with both as if there were one process."""
        return self.A.is_whole and self.B.is_whole


HERE = Places()
