"""One long row of tokens, and a language model of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

_EVALUATED = 128  # windows, at most


def windows(stream: Tensor, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields random windows of the stream (k,), as (batch_size, length) of int64."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(stream) - length, (batch_size,), generator=generator)
        yield torch.stack([stream[start : start + length] for start in starts.tolist()]).long()


def next_token_accuracy(model: nn.Module, stream: Tensor, length: int, device: str = "cpu") -> float:
    """Returns the share of next tokens that the model ranks first, over windows side by side."""
    length = min(length, len(stream))
    rows = stream[: len(stream) // length * length].view(-1, length)[:_EVALUATED].long()
    right = [
        (model(input_ids=part).logits.argmax(-1)[:, :-1] == part[:, 1:]).float() for part in rows.to(device).split(32)
    ]
    return torch.cat(right).mean().item()
