"""Tensors that a task makes once and then finds in the cache: pretrained weights, tokenised texts."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from torch import Tensor

from sdsopt.compare.cache import load_tensors, save_tensors


class Prepares(Protocol):
    """A hashable task with something to prepare."""

    @property
    def fingerprint(self) -> str:
        """Names the tensors in the cache."""
        ...

    def make_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors, each time the same."""
        ...


def ensure_prepared(task: Prepares) -> None:
    """Makes the tensors, unless the cache has them."""
    if load_tensors(task.fingerprint) is None:
        save_tensors(task.fingerprint, task.make_tensors())


def prepared(task: Prepares) -> dict[str, Tensor]:
    """Returns the tensors; makes them where `ensure_prepared` was not called, or no cache can be written."""
    return in_memory(task, task.fingerprint)


@cache
def in_memory(task: Prepares, fingerprint: str) -> dict[str, Tensor]:
    """Reads them once, as long as what they are made of stays as it is."""
    return load_tensors(fingerprint) or task.make_tensors()
