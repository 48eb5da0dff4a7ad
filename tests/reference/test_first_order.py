"""`sds-split` on standard LoRA and the paper's layer make the same step of the product, to first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer

from sdsopt import GramPower, SDSPreconditioner
from sdsopt.reference import SDSLinear
from toy import LoRALinear, factor

ROWS, COLUMNS, RANK, S = 9, 7, 3, 0.7
RATES = (1e-4, 5e-5, 2.5e-5)
SPLIT = GramPower(0.5, 0.5, max_update_ratio=None)


def G() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def balanced() -> tuple[Tensor, Tensor]:
    """LoRA factors A = √S·Vᵀ and B = U·√S, whose polar bases are the paper's U and Vᵀ."""
    U, values, Vt = torch.linalg.svd(factor(ROWS, RANK, 20.0, 1) @ factor(RANK, COLUMNS, 5.0, 2), full_matrices=False)
    root = values[:RANK].sqrt()
    return root[:, None] * Vt[:RANK], U[:, :RANK] * root


def rotated() -> tuple[Tensor, Tensor]:
    """The same product in another gauge: another basis, which plain SGD does not see."""
    A, B = balanced()
    T = factor(RANK, RANK, 3.0, 5)
    return T @ A, B @ torch.linalg.inv(T)


def sgd(parameters: Iterable[Parameter], lr: float) -> Optimizer:
    return SGD(parameters, lr=lr)


def adamw(parameters: Iterable[Parameter], lr: float) -> Optimizer:
    return AdamW(parameters, lr=lr, weight_decay=0.0)


def lora_step(A: Tensor, B: Tensor, make: Callable[..., Optimizer], lr: float, correction: Any = SPLIT) -> Tensor:
    """The change of ΔW in one step on a loss whose gradient is G."""
    model = LoRALinear(A, B, S)
    before = model.delta
    model.backward_from(G())
    SDSPreconditioner(make(model.parameters(), lr=lr), model, correction, damping=0.0).step()
    return model.delta - before


def reference_step(A: Tensor, B: Tensor, make: Callable[..., Optimizer], lr: float) -> Tensor:
    layer = SDSLinear(nn.Identity(), Parameter(A.clone()), Parameter(B.clone()), S)
    layer.split()
    before = layer.delta
    layer.A.grad = S * layer.Q_B.T @ G()
    layer.B.grad = S * G() @ layer.Q_A.T
    make([layer.A, layer.B], lr=lr).step()
    return layer.delta - before


def order(differences: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(differences)]


@pytest.mark.parametrize(
    ("make", "gauge"),
    [(sgd, balanced), (sgd, rotated), (adamw, balanced)],
    ids=["sgd", "sgd in another gauge", "adamw"],
)
def test_they_differ_by_the_square_of_the_learning_rate(
    make: Callable[..., Optimizer], gauge: Callable[[], tuple[Tensor, Tensor]]
) -> None:
    factors = gauge()
    steps = [(lora_step(*factors, make, lr), reference_step(*factors, make, lr)) for lr in RATES]
    differences = [float((one - other).norm()) for one, other in steps]
    assert order(differences) == pytest.approx([2.0, 2.0], abs=0.02)
    assert order([float(one.norm()) for one, _ in steps]) == pytest.approx([1.0, 1.0], abs=0.02)
    assert differences[0] < 0.02 * steps[0][0].norm()


@pytest.mark.parametrize("correction", ["lora", "sds", "scaled"])
def test_the_other_corrections_differ_already_in_first_order(correction: str) -> None:
    """So the test above can fail. `scaled` is the same step under plain SGD alone."""
    factors = balanced()
    differences = [
        float((lora_step(*factors, adamw, lr, correction) - reference_step(*factors, adamw, lr)).norm()) for lr in RATES
    ]
    assert order(differences) == pytest.approx([1.0, 1.0], abs=0.05)
