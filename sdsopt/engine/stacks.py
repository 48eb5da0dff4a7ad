"""Which tensors are computed with as one: few and large kernels for a device that a call keeps waiting."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

_T = TypeVar("_T")

# A stack is a copy of its tensors, so there is a limit to it. On a CPU it pays where a call costs more than what it
# does; on other devices a call nearly always costs more than a copy.
_CPU_BYTES = 32 * 2**10
_DEVICE_BYTES = 128 * 2**20
# Gradients, factors, what is made of them, in float64 with some corrections, and room for a product's parts.
_COPIES = 16


def stacks(
    items: Iterable[_T],
    tensors_of: Callable[[_T], Sequence[Tensor]],
    in_common: Callable[[_T], Hashable],
    max_workspace_bytes: int | None = None,
) -> list[list[_T]]:
    """Groups items whose tensors can be stacked along their first dimension.

    Args:
        items: In any order.
        tensors_of: The tensors of an item, at least one. In a group they have the same shapes, dtypes and devices.
        in_common: What else the items of a group must agree on.
        max_workspace_bytes: What computing with a group may take; None for as much as the device likes.

    Returns:
        The groups, each of at most a fixed number of bytes, or of one item.
    """
    open_groups: dict[Hashable, list[_T]] = {}
    result: list[list[_T]] = []
    for item in items:
        tensors = tensors_of(item)
        size = 0
        for tensor in tensors:
            size += tensor.numel() * tensor.element_size()  # nbytes cannot be traced
        limit = _limit(tensors[0], max_workspace_bytes)
        if 2 * size > limit:
            result.append([item])
            continue
        key = in_common(item), *[(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        group = open_groups.get(key)
        if group is None or (len(group) + 1) * size > limit:
            open_groups[key] = group = []
            result.append(group)
        group.append(item)
    return result


def _limit(tensor: Tensor, max_workspace_bytes: int | None) -> int:
    limit = _CPU_BYTES if tensor.device.type == "cpu" else _DEVICE_BYTES
    return limit if max_workspace_bytes is None else min(limit, max_workspace_bytes // _COPIES)
