"""Where the correction pays: SGD on a low-rank factorization whose solution is ill-conditioned.

Minimises ½‖B·A − W‖² for a W (60×50) of rank 5, from a start near the solution, and counts the steps to a relative
error of 1e-6 at the best of five learning rates. κ is the condition number of W; each factor's is √κ.
Run it: `python examples/ill_conditioned.py`
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdsopt import SDSPreconditioner

ROWS, COLUMNS, RANK = 60, 50, 5
LEARNING_RATES = (1.0, 0.5, 0.2, 0.1, 0.05)
CORRECTIONS = ("lora", "sds", "sds-split", "scaled")
CONDITIONS = (1, 10, 100, 1000)
LIMIT = 2000  # steps


class Product(nn.Module):
    """B·A, with the attributes that PEFT gives its LoRA layers, so that `find_pairs` knows it."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(A.shape[1], A.shape[0], bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(B.shape[1], B.shape[0], bias=False)})
        self.scaling = {"default": 1.0}
        self.load_state_dict({"lora_A.default.weight": A, "lora_B.default.weight": B}, assign=True)
        self.requires_grad_()

    def forward(self) -> Tensor:
        return self.get_parameter("lora_B.default.weight") @ self.get_parameter("lora_A.default.weight")


def problem(condition: float, seed: int = 0) -> tuple[Product, Tensor]:
    """Returns balanced factors, each 1 % off, and the W (60, 50) to reach; its singular values are 1 … 1/κ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    left, right = (torch.linalg.qr(normal(size, RANK)).Q for size in (ROWS, COLUMNS))
    root = torch.logspace(0, -0.5, RANK, base=condition, dtype=torch.float64).diag()
    B, A = left @ root, root @ right.T
    off = [
        factor + 0.01 * factor.norm() * noise / noise.norm() for factor in (A, B) for noise in (normal(*factor.shape),)
    ]
    return Product(*off), B @ A


def iterations(correction: str, condition: float, learning_rate: float) -> int:
    """Returns the number of SGD steps to a relative error of 1e-6, or `LIMIT` if there is no getting there."""
    model, target = problem(condition)
    optimizer = SDSPreconditioner(torch.optim.SGD(model.parameters(), lr=learning_rate), model, correction)
    for step in range(LIMIT):
        error = model() - target
        relative = (error.norm() / target.norm()).item()
        if relative < 1e-6:
            return step
        if not relative < 1e3:
            return LIMIT  # diverged
        optimizer.zero_grad()
        (0.5 * error.square().sum()).backward()
        optimizer.step()
    return LIMIT


def best_iterations(correction: str, condition: float) -> int:
    """Returns the iterations at the best of the learning rates."""
    return min(iterations(correction, condition, learning_rate) for learning_rate in LEARNING_RATES)


def main() -> None:
    print("iterations at κ =", *(f"{condition:>6}" for condition in CONDITIONS))
    for correction in CORRECTIONS:
        counts = (best_iterations(correction, condition) for condition in CONDITIONS)
        print(f"{correction:<16}", *(f"{count:>6}" if count < LIMIT else f" >{LIMIT}" for count in counts), flush=True)


if __name__ == "__main__":
    main()
