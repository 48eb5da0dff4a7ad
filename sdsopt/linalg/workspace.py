"""The memory that is computed with: how much at a time, and where results are put."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling


class EmptyLike(Protocol):
    """Makes a tensor with the shape and strides of another one, and its dtype unless one is given."""

    def __call__(self, like: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor: ...


class _Workspace:
    max_bytes: int | None = None
    empty_like: EmptyLike = staticmethod(torch.empty_like)


class _WorkspaceOfThread(threading.local, _Workspace):
    pass


_of_thread = _WorkspaceOfThread()
_while_compiling = _Workspace()  # torch.compile does not trace what is a thread's own


@contextmanager
def workspace(max_bytes: int | None, empty_like: EmptyLike = torch.empty_like) -> Generator[None]:
    """Says what products inside compute with.

    Args:
        max_bytes: How much at a time; they then convert less at once, if need be. None leaves them as they are.
        empty_like: Makes the tensors that results are written into. Inside `torch.compile`, torch makes them.
    """
    present = _present()
    outside = present.max_bytes, present.empty_like
    present.max_bytes, present.empty_like = max_bytes, empty_like
    try:
        yield
    finally:
        present.max_bytes, present.empty_like = outside


def part_bytes(usual: int) -> int:
    """Returns how many bytes of a long tensor to convert at once, if the usual number is not too many."""
    # A part, its product, and one of the two in the tensor's own dtype.
    max_bytes = _present().max_bytes
    return usual if max_bytes is None else min(usual, max_bytes // 4)


def empty_result(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor for a result, of any content, shaped as another one, and of its dtype unless one is given."""
    return torch.empty_like(like, dtype=dtype) if is_compiling() else _of_thread.empty_like(like, dtype=dtype)


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a copy of a tensor as a result, in its own dtype unless one is given."""
    if tensor.device.type != "cpu":
        return tensor.to(dtype or tensor.dtype, copy=True)
    return empty_result(tensor, dtype).copy_(tensor)


def _present() -> _Workspace:
    return _while_compiling if is_compiling() else _of_thread
