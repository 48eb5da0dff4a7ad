"""Matrix factorization and sensing with a solution of chosen condition number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sdsopt.compare.learning_rates import log_grid
from sdsopt.compare.task import Task

_LOWEST = {"adamw": 1e-4, "sgd": 0.02}


@dataclass(frozen=True)
class FactorizationTask(Task):
    """Finds a matrix of condition number κ from a start near it, as a product of two factors.

    Without noise, so the loss can reach zero where the adapters have the target's rank: what is compared is how fast.

    Attributes:
        condition: κ of the target; each balanced factor's is √κ.
        target_rank: The target's rank.
        rows: Height of the target.
        columns: Its width.
        distance: How far from the solution each factor starts, relative to its norm.
        measurements: Number of random linear measurements of the matrix in each batch (matrix sensing, fresh ones in
            every step); 0 shows the matrix itself.
    """

    condition: float = 100.0
    target_rank: int = 8
    rows: int = 60
    columns: int = 50
    distance: float = 0.1
    measurements: int = 0

    @property
    def name(self) -> str:
        """Names the kind and κ."""
        return f"{'sensing' if self.measurements else 'factorization'}, κ = {self.condition:g}"

    def build_model(self, rank: int | None) -> nn.Module:
        """Returns factors near the solution, or for full fine-tuning their product; the seed draws both."""
        root = torch.logspace(0, -0.5, self.target_rank, base=self.condition).diag()
        left, right = (torch.linalg.qr(torch.randn(size, self.target_rank)).Q for size in (self.rows, self.columns))
        solution_A, solution_B = root @ right.T, left @ root
        width = rank or self.target_rank
        A = _near(_with_rank(solution_A.T, width).T, self.distance)
        B = _near(_with_rank(solution_B, width), self.distance)
        return _Matrix(A, B, target=solution_B @ solution_A, full=rank is None)

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yields measurement matrices (measurements, rows, columns), or an empty tensor."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(self.measurements, self.rows, self.columns, generator=generator)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Half the squared error, or that of the measurements on average, relative to the target's norm."""
        error = model() / _target(model).norm()
        if not self.measurements:
            return 0.5 * error.square().sum()
        return 0.5 * torch.einsum("kmn,mn->k", batch, error).square().mean()

    def evaluate(self, model: nn.Module) -> float:
        """Share of the target that is explained: 1 − relative error, at least 0."""
        return max(0.0, 1 - (model().norm() / _target(model).norm()).item())

    def learning_rates(self, inner: str, method: str) -> Sequence[float]:
        """One start for all methods, since the grid widens where it must."""
        del method
        return log_grid(_LOWEST[inner], 6)


class _Matrix(nn.Module):
    """B·A − target, or W − target; the factors are recognised as loralib's are."""

    target: Tensor

    def __init__(self, A: Tensor, B: Tensor, *, target: Tensor, full: bool) -> None:
        super().__init__()
        self.register_buffer("target", target)
        self.scaling = 1.0
        if full:
            self.weight = Parameter(B @ A)
        else:
            self.lora_A = Parameter(A)
            self.lora_B = Parameter(B)

    def forward(self) -> Tensor:
        product = self.weight if hasattr(self, "weight") else self.lora_B @ self.lora_A
        return product - self.target


def _target(model: nn.Module) -> Tensor:
    return model.get_buffer("target")


def _with_rank(factor: Tensor, rank: int) -> Tensor:
    """Cuts columns of (d, target_rank) off, or adds zeros."""
    return nn.functional.pad(factor, (0, rank - factor.shape[1]))


def _near(factor: Tensor, distance: float) -> Tensor:
    noise = torch.randn_like(factor)
    return factor + distance * factor.norm() / math.sqrt(factor.numel()) * noise
