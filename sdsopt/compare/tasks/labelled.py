"""Tokenised texts with a class each, and a classifier of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class LabelledTexts(NamedTuple):
    """Texts, padded on the right to one length.

    Attributes:
        tokens: (k, length).
        mask: (k, length), 1 where there is a token.
        labels: (k,).
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor

    def at(self, chosen: Tensor) -> LabelledTexts:
        """The chosen rows, without the columns that pad them all."""
        width = int(self.mask[chosen].sum(1).max())
        return LabelledTexts(self.tokens[chosen, :width], self.mask[chosen, :width], self.labels[chosen])

    def shuffled(self, batch_size: int, seed: int) -> Iterator[LabelledTexts]:
        """Yields batches, epoch after epoch, each in a new order."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            for chosen in order[: len(order) // batch_size * batch_size].view(-1, batch_size):
                yield self.at(chosen)

    def to(self, device: str) -> LabelledTexts:
        """The same on a device."""
        return LabelledTexts(*(tensor.to(device) for tensor in self))


def logits(model: nn.Module, batch: LabelledTexts) -> Tensor:
    """Returns a Hugging Face classifier's logits, (k, classes)."""
    return model(input_ids=batch.tokens, attention_mask=batch.mask).logits


def accuracy(model: nn.Module, data: LabelledTexts, device: str = "cpu") -> float:
    """Returns the share of the texts whose class the model ranks first."""
    parts = (data.at(rows).to(device) for rows in torch.arange(len(data.labels)).split(64))
    right = sum((logits(model, batch).argmax(-1) == batch.labels).sum() for batch in parts)
    return float(right) / len(data.labels)
