"""The same simple operation on many tensors: one call for all of them, where a device has that."""

# torch's own optimizers are made of these functions; their names are private all the same.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sdsopt.corrections import PairTensors


def copy(tensors: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Writes each tensor into its target."""
    if tensors:  # foreach functions refuse empty lists
        torch._foreach_copy_(list(targets), list(tensors))


def shrunk(tensors: Sequence[Tensor], shares: Sequence[float | Tensor]) -> list[Tensor]:
    """Returns tensor·(1 - share) for each; the tensors themselves where no share is taken off any."""
    if any(isinstance(share, Tensor) for share in shares):
        return [tensor * (1 - share) for tensor, share in zip(tensors, shares, strict=True)]
    if not any(shares):
        return list(tensors)
    return list(torch._foreach_mul(list(tensors), [1 - share for share in shares if not isinstance(share, Tensor)]))


def differences(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensor - other for each."""
    return list(torch._foreach_sub(list(tensors), list(others)))


def set_to_sums(targets: Sequence[Tensor], tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Writes tensor + other into each target."""
    torch._foreach_copy_(list(targets), torch._foreach_add(list(tensors), list(others)))


def flat(pairs: Iterable[PairTensors]) -> list[Tensor]:
    """Returns the tensors that there are, pair by pair, A before B."""
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def like(pairs: Iterable[PairTensors], tensors: Iterable[Tensor]) -> list[PairTensors]:
    """Inverse of `flat`: distributes tensors over the places at which pairs have one."""
    rest = iter(tensors)
    return [PairTensors(*(None if tensor is None else next(rest) for tensor in pair)) for pair in pairs]
