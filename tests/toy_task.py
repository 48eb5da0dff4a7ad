"""A task that takes milliseconds: regression onto a low-rank matrix. Worker processes import it by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sdsopt.compare import Task
from toy import LoRALinear, factor


class Dense(nn.Module):
    def __init__(self, base: Tensor, rank: int | None) -> None:
        super().__init__()
        self.base = nn.Parameter(base, requires_grad=rank is None)
        self.lora = None
        if rank is not None:
            A = torch.randn(rank, base.shape[1]) / base.shape[1] ** 0.5
            self.lora = LoRALinear(A, torch.zeros(base.shape[0], rank))
        self.bias = nn.Parameter(torch.zeros(base.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.base.T + self.bias
        return y if self.lora is None else y + self.lora(x)


@dataclass(frozen=True)
class Regression(Task):
    batch_size: int = 16
    count_file: str = ""  # one character for each model that was built, by whichever process
    explode: bool = False

    def build_model(self, rank: int | None) -> nn.Module:
        if self.count_file:
            with Path(self.count_file).open("a") as file:
                file.write(".")
        return Dense(torch.zeros(6, 8), rank)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        target = (factor(6, 3) @ factor(3, 8)).float()
        while True:
            x = torch.randn(self.batch_size, 8, generator=generator)
            yield x, x @ target.T

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = (model(x) - y).square().mean()
        return loss * torch.inf if self.explode else loss

    def evaluate(self, model: nn.Module) -> float:
        x, y = next(self.batches(10_000))
        return float(((model(x) - y).abs() < 0.1).float().mean())

    def shared_parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [model.bias]  # pyright: ignore
