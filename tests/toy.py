"""LoRA layers without PEFT, of its structure, with factors of any condition number."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer


def factor(rows: int, columns: int, condition: float = 2.0, seed: int = 0) -> Tensor:
    """A float64 matrix whose singular values fall geometrically from 1 to 1/condition."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, singular_values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ torch.diag(torch.logspace(0, -1, len(singular_values), base=condition, dtype=torch.float64)) @ right


class LoRALinear(nn.Module):
    """y = x·(s·B·A)ᵀ, with the attributes that PEFT gives its layers."""

    def __init__(self, A: Tensor, B: Tensor, scaling: float = 1.0) -> None:
        super().__init__()
        (rank, columns), rows = A.shape, B.shape[0]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, rows, bias=False)})
        self.scaling = {"default": scaling}
        self.A = A
        self.B = B

    @property
    def A(self) -> Parameter:
        return self.lora_A["default"].weight  # pyright: ignore

    @A.setter
    def A(self, value: Tensor) -> None:
        self.lora_A["default"].weight = Parameter(value.clone())

    @property
    def B(self) -> Parameter:
        return self.lora_B["default"].weight  # pyright: ignore

    @B.setter
    def B(self, value: Tensor) -> None:
        self.lora_B["default"].weight = Parameter(value.clone())

    @property
    def delta(self) -> Tensor:
        """ΔW (m, n)."""
        return self.scaling["default"] * self.B.detach() @ self.A.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))

    def backward_from(self, gradient: Tensor) -> None:
        """Sets the gradients that a loss with ∂L/∂W = `gradient` (m, n) would give the factors."""
        s, A, B = self.scaling["default"], self.A.detach(), self.B.detach()
        self.A.grad = s * B.T @ gradient.to(B.dtype)
        self.B.grad = s * gradient.to(A.dtype) @ A.T


def lora_linear(
    rows: int = 12,
    columns: int = 10,
    rank: int = 4,
    *,
    condition: float = 10.0,
    scaling: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoRALinear:
    A = factor(rank, columns, condition, seed).to(dtype)
    B = factor(rows, rank, condition, seed + 1).to(dtype)
    return LoRALinear(A, B, scaling)


class Network(nn.Module):
    """Two LoRA layers, whose ranks differ, and a head that is no pair.

    From a width of 1536 on, one factor of each has the 4096 elements and more for which optimizers keep low-bit state.
    """

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = 12) -> None:
        super().__init__()
        self.first = lora_linear(width, 10, 4, seed=seed, scaling=2.0, dtype=dtype)
        self.second = lora_linear(9, width, 3, seed=seed + 10, scaling=0.5, dtype=dtype)
        self.head = nn.Linear(9, 3, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    def loss(self, step: int = 0) -> Tensor:
        """The squared output on a batch that depends on the step alone."""
        generator = torch.Generator().manual_seed(100 + step)
        x = torch.randn(16, 10, generator=generator).to(self.first.A.dtype)
        return self(x).square().mean()


def train(model: Network, optimizer: Optimizer, steps: int = 3, first: int = 0) -> None:
    """Steps on the batches first, first + 1, …"""
    for step in range(first, first + steps):
        model.zero_grad()
        model.loss(step).backward()
        optimizer.step()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Parameters and buffers are finite, and equal bit for bit."""
    pairs = list(zip(one.state_dict().items(), other.state_dict().items(), strict=True))
    assert pairs
    for (name, tensor), (_, other_tensor) in pairs:
        assert tensor.isfinite().all(), name
        assert torch.equal(tensor, other_tensor), name
