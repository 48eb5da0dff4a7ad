"""What is trained. Subclass `Task` to compare optimizers on your own model and data."""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from sdsopt.compare.learning_rates import default_learning_rates


class Task(ABC):
    """A model, its data, a loss to minimise and a held-out accuracy to report.

    One instance serves many runs, in several processes when `jobs > 1`: keep it small and picklable, and leave its
    state unchanged after `prepare`.
    """

    @property
    def name(self) -> str:
        """Shown in tables and figures."""
        return type(self).__name__

    @property
    def fingerprint(self) -> str:
        """Results are shared between sweeps only where this is equal.

        The default covers the class's source and the instance's plain attributes, so an edited task is run afresh.
        Override it where results depend on more, such as a file of data.
        """
        cls = type(self)
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # typed into an interpreter
            source = ""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, bool | int | float | str)}
        text = f"{cls.__qualname__}\n{source}\n{sorted(plain.items())}"
        return f"{cls.__qualname__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def prepare(self) -> None:
        """Called once before the sweep, in the main process: downloads, pretraining, caches."""
        return None

    @abstractmethod
    def build_model(self, rank: int | None) -> nn.Module:
        """Returns a new model in training mode. The global generators are seeded with the run's seed before.

        Args:
            rank: Rank of the LoRA adapters. None asks for full fine-tuning: no adapters, and the matrices that they
                would have adapted require gradients themselves.
        """

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Yields at least as many batches as there are steps, in an order that depends on the seed alone."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Returns the loss to minimise, a scalar."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """Returns the held-out accuracy, between 0 and 1. Called in evaluation mode and without gradients."""

    def shared_parameters(self, model: nn.Module) -> Iterable[Parameter]:
        """Parameters that are no method's business, such as a fresh classifier head.

        They learn with `Inner.shared_lr` in every run. At the swept rate, a method whose best rate is small would
        also be the one whose head learns slowly.
        """
        del model
        return ()

    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        """Returns the grid to sweep, where the user names none. Give every method equally many."""
        return default_learning_rates(inner, method)
