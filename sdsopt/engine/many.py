"""The same simple operation on many tensors: one call for all of them, where a device has that.

A CPU has not: there each result is written where it belongs, as what is new comes page by page from the system.
"""

# torch's own optimizers are made of these functions; their names are private all the same.
# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sdsopt.corrections import PairTensors
from sdsopt.linalg import empty_result


def copy(tensors: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Writes each tensor into its target."""
    if tensors:  # foreach functions refuse empty lists
        torch._foreach_copy_(list(targets), list(tensors))


def shrunk(tensors: Sequence[Tensor], shares: Sequence[float | Tensor]) -> list[Tensor]:
    """Returns tensor·(1 - share) for each; the tensors themselves where no share is taken off any."""
    numbers = [share for share in shares if not isinstance(share, Tensor)]
    all_numbers = len(numbers) == len(shares)
    if all_numbers and not any(numbers):
        return list(tensors)
    if _one_by_one(tensors):
        return [torch.mul(one, 1 - share, out=empty_result(one)) for one, share in zip(tensors, shares, strict=True)]
    if all_numbers:
        return list(torch._foreach_mul(list(tensors), [1 - number for number in numbers]))
    return [tensor * (1 - share) for tensor, share in zip(tensors, shares, strict=True)]


def differences(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensor - other for each."""
    if _one_by_one(tensors):
        return [torch.sub(one, other, out=empty_result(one)) for one, other in zip(tensors, others, strict=True)]
    return list(torch._foreach_sub(list(tensors), list(others)))


def set_to_sums(targets: Sequence[Tensor], tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Writes tensor + other into each target."""
    if _one_by_one(targets):
        for target, one, other in zip(targets, tensors, others, strict=True):
            torch.add(one, other, out=target)
        return
    torch._foreach_copy_(list(targets), torch._foreach_add(list(tensors), list(others)))


def _one_by_one(tensors: Sequence[Tensor]) -> bool:
    return not torch.compiler.is_compiling() and all(tensor.device.type == "cpu" for tensor in tensors)


def flat(pairs: Iterable[PairTensors]) -> list[Tensor]:
    """Returns the tensors that there are, pair by pair, A before B."""
    return [tensor for pair in pairs for tensor in pair if tensor is not None]


def like(pairs: Iterable[PairTensors], tensors: Iterable[Tensor]) -> list[PairTensors]:
    """Inverse of `flat`: distributes tensors over the places at which pairs have one."""
    rest = iter(tensors)
    return [PairTensors(*(None if tensor is None else next(rest) for tensor in pair)) for pair in pairs]
