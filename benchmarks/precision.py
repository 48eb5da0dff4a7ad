"""What is lost, and what is won, if float32 gradients are multiplied by their roots in float32.

    python benchmarks/precision.py

First the relative error of M_B^(-p)·gA beside an SVD in float64 on the same float32 gradient, the largest of 8 draws:
with the root applied in float64 and rounded once (as the library does), with the root rounded to float32 and applied in
float32, and with the Gram matrix in float32 as well. The last column is what rounding the gradient to float32 in
backward does to the result already. Then the CPU time of the products for all pairs of Llama-3-8B at r = 16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from sdsopt import use_native_products
from sdsopt.bench.shapes import SHAPES
from sdsopt.errors import NativeBuildError
from sdsopt.linalg import gram, make_inverse_root, multiply_left, multiply_right

RANK = 16
DAMPING = 1e-6


def factor(rows: int, rank: int, condition: float) -> Tensor:
    """A float32 matrix whose singular values fall geometrically from 1 to 1/condition."""
    left, _, right = torch.linalg.svd(torch.randn(rows, rank, dtype=torch.float64), full_matrices=False)
    return ((left * torch.logspace(0, -1, rank, base=condition, dtype=torch.float64)) @ right).float()


def by_svd(matrix: Tensor, exponent: float) -> Tensor:
    _, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    squares = values.square()
    return (right.mT * (squares + DAMPING * squares[0]).pow(-exponent)) @ right


def by_eigh(gram_matrix: Tensor, exponent: float) -> Tensor:
    return make_inverse_root("eigh").compute(gram_matrix[None], [exponent], DAMPING).roots[0][0]


def errors(rank: int, condition: float, exponent: float) -> Sequence[float]:
    B, G = factor(200, rank, condition), torch.randn(200, 150, dtype=torch.float64)
    exact = B.double().mT @ G
    gradient = exact.float()
    root, reference = by_eigh(gram(B), exponent), by_svd(B, exponent)
    wanted = reference @ gradient.double()
    results = (
        multiply_left(root, gradient),
        root.float() @ gradient,
        by_eigh(B.mT @ B, exponent) @ gradient,
        reference @ exact,
    )
    return [float((result - wanted).norm() / wanted.norm()) for result in results]


def milliseconds(function: Callable[[Tensor], object], tensors: Sequence[Tensor]) -> float:
    times: list[float] = []
    for _ in range(8):
        started = time.process_time()
        for tensor in tensors:
            function(tensor)
        times.append(time.process_time() - started)
    return 1e3 * median(times[1:])


def main() -> None:
    torch.manual_seed(0)
    print("| κ | p | r | applied in float64 | in float32 | Gram in float32 too | rounding of the gradient |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for condition in (10.0, 100.0, 1e4):
        for exponent in (0.5, 1.0):
            for rank in (2, 4, 16, 64):
                draws = [errors(rank, condition, exponent) for _ in range(8)]
                worst = " | ".join(f"{max(column):.1e}" for column in zip(*draws, strict=True))
                print(f"| {condition:g} | {exponent} | {rank} | {worst} |")

    torch.empty(31 * 2**20, dtype=torch.uint8)  # as sdsopt.bench.adapter: glibc then keeps the memory of small blocks
    shape = SHAPES["llama-3-8b"]
    wide = [torch.randn(RANK, layer.columns) for layer in shape.block] * shape.blocks
    tall = [torch.randn(layer.rows, RANK) for layer in shape.block] * shape.blocks
    root = torch.randn(RANK, RANK, dtype=torch.float64)
    root_32 = root.float()
    operations = 2 * RANK * sum(tensor.numel() for tensor in (*wide, *tall))

    print("\n| products, ms | A·Aᵀ | Bᵀ·B | root·gA | gB·root | Gflop/s |\n|---|---:|---:|---:|---:|---:|")

    def row(name: str, *functions: Callable[[Tensor], object]) -> None:
        times = [milliseconds(f, tensors) for f, tensors in zip(functions, (wide, tall, wide, tall), strict=True)]
        rate = 2 * operations / sum(times) / 1e6
        print(f"| {name} | {' | '.join(f'{t:.1f}' for t in times)} | {rate:.0f} |")

    exact = (
        lambda A: gram(A.mT),
        gram,
        lambda A: multiply_left(root, A),
        lambda B: multiply_right(B, root),
    )
    row("torch, float64", *exact)
    row("torch, float32", lambda A: A @ A.mT, lambda B: B.mT @ B, lambda A: root_32 @ A, lambda B: B @ root_32)
    try:
        use_native_products()
    except NativeBuildError as error:
        print(f"\nNo compiled products: {error}")
    else:
        row("compiled, float64", *exact)
    for dtype in (torch.float32, torch.float64):
        square = torch.randn(1536, 1536, dtype=dtype)
        seconds = 1e-3 * milliseconds(lambda X: X @ X, [square])
        print(f"\nThis core in {dtype}: {2 * 1536**3 / seconds / 1e9:.0f} Gflop/s (a product of 1536 × 1536 matrices)")


if __name__ == "__main__":
    main()
