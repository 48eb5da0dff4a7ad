"""The list of pairs that `find_pairs` returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import final, overload

from sdsopt.pairs.layout import Skipped
from sdsopt.pairs.pair import LoRAPair


@final
class PairList(Sequence[LoRAPair]):
    """An immutable list of pairs, which prints as a summary of what was found and what was not.

    Args:
        pairs: The pairs, in the order of the model's modules.
        skipped: What resembles a pair but is left alone, and why.
    """

    def __init__(self, pairs: Iterable[LoRAPair], skipped: Iterable[Skipped] = ()) -> None:
        self._pairs = tuple(pairs)
        self.skipped = tuple(skipped)

    @overload
    def __getitem__(self, index: int) -> LoRAPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairList: ...
    def __getitem__(self, index: int | slice) -> LoRAPair | PairList:
        return PairList(self._pairs[index], self.skipped) if isinstance(index, slice) else self._pairs[index]

    def __len__(self) -> int:
        return len(self._pairs)

    def __repr__(self) -> str:
        """For example: ``28 LoRA pairs, rank 8, adapter default; skipped: 2 × both factors are frozen (…)``."""
        text = f"{len(self)} LoRA pair{'' if len(self) == 1 else 's'}"
        if self:
            ranks = sorted({pair.rank for pair in self})
            adapters = sorted({pair.adapter for pair in self})
            text += f", rank {', '.join(map(str, ranks))}, adapter {', '.join(adapters)}"
        # Thousands of layers are usually skipped for the same few reasons.
        reasons = Counter(skipped.reason for skipped in self.skipped)
        if reasons:
            first = {skipped.reason: skipped.name for skipped in reversed(self.skipped)}
            parts = (f"{count} × {reason} ({first[reason]}{', …' * (count > 1)})" for reason, count in reasons.items())
            text += f"; skipped: {'; '.join(parts)}"
        return text
