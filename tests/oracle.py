"""The formulas, written once more: in float64, by SVD, one matrix at a time."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

from sdsopt import LoRAPair


def inverse_root(factor: Tensor, exponent: float, damping: float) -> Tensor:
    """(XᵀX + δ·λmax·I)^(-p) for one factor X (d, r); the identity for X = 0."""
    _, singular_values, right = torch.linalg.svd(factor.double(), full_matrices=True)
    rank = factor.shape[-1]
    eigenvalues = torch.zeros(rank, dtype=torch.float64)
    eigenvalues[: len(singular_values)] = singular_values**2
    if eigenvalues.max() == 0:
        return torch.eye(rank, dtype=torch.float64)
    damped = eigenvalues + damping * eigenvalues.max()
    return right.T @ torch.diag(damped**-exponent) @ right


def polar(factor: Tensor) -> Tensor:
    """U·Vᵀ of the thin SVD: the orthonormal matrix closest to X."""
    left, _, right = torch.linalg.svd(factor.double(), full_matrices=False)
    return left @ right


def corrected(
    A: Tensor, B: Tensor, gradient_A: Tensor, gradient_B: Tensor, exponent: float, damping: float
) -> tuple[Tensor, Tensor]:
    """M_B^(-p)·gA and gB·M_A^(-p), for one pair A (r, n), B (m, r)."""
    if exponent == 0:
        return gradient_A.double(), gradient_B.double()
    return (
        inverse_root(B, exponent, damping) @ gradient_A.double(),
        gradient_B.double() @ inverse_root(A.T, exponent, damping),
    )


def corrected_pair(pair: LoRAPair, exponent: float, damping: float) -> tuple[Tensor, Tensor]:
    """The same for a pair with gradients, block by block, in the canonical shapes (e, r, n) and (e, m, r)."""
    assert pair.A.grad is not None
    assert pair.B.grad is not None
    A, gradient_A = (pair.split_A(tensor.detach()) for tensor in (pair.A, pair.A.grad))
    B, gradient_B = (pair.split_B(tensor.detach()) for tensor in (pair.B, pair.B.grad))
    blocks = [corrected(*tensors, exponent, damping) for tensors in zip(A, B, gradient_A, gradient_B, strict=True)]
    return torch.stack([a for a, _ in blocks]), torch.stack([b for _, b in blocks])


def lora_pro(
    A: Tensor, B: Tensor, gradient_A: Tensor, gradient_B: Tensor, scaling: float, damping: float
) -> tuple[Tensor, Tensor]:
    """LoRA-Pro's closed form with its (m, m) projector, and X by Bartels and Stewart's algorithm."""
    B = B.double()
    M_A, M_B = inverse_root(A.T, -1, damping), inverse_root(B, -1, damping)
    a, b = (gradient / scaling**2 for gradient in corrected(A, B, gradient_A, gradient_B, 1, damping))
    X = torch.from_numpy(scipy.linalg.solve_sylvester(M_B.numpy(), M_A.numpy(), -(a @ A.double().T).numpy()))
    projector = B @ inverse_root(B, 1, damping) @ B.T  # (m, m)
    return a + X @ A.double(), b - projector @ b - B @ X


def muon_step(
    A: Tensor, B: Tensor, momentum_A: Tensor, momentum_B: Tensor, scaling: float, lr: float, damping: float
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of LoRA-Muon, with W = s·B·A in place of its A·Bᵀ."""
    R_A, R_B = inverse_root(A.T, 0.5, damping), inverse_root(B, 0.5, damping)
    length = -lr / (2 * scaling)
    return length * R_B @ polar(R_B @ momentum_A.double()), length * polar(momentum_B.double() @ R_A) @ R_A


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the Frobenius norm."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Rite:
    """LoRA-RITE's algorithm for one factor X (d, r) of Z = X·Yᵀ, with QR for the paper's polar decomposition.

    Averages are bias-corrected as in its published code. No damping.
    """

    def __init__(self, beta1: float, beta2: float) -> None:
        self.betas = beta1, beta2
        self.steps = 0
        self.basis = self.V = self.M = None
        self.rho = 0.0

    def step(self, Y: Tensor, gradient: Tensor) -> Tensor:
        """Returns the direction of X's step, from the partner Y (k, r) and ∂L/∂X (d, r)."""
        self.steps += 1
        beta1, beta2 = (b * (1 - b ** (self.steps - 1)) / (1 - b**self.steps) for b in self.betas)
        U, R = torch.linalg.qr(Y.double())
        unmagnified = gradient.double() @ torch.linalg.inv(R)
        second = unmagnified.T @ unmagnified / len(unmagnified)
        if self.basis is None or self.V is None or self.M is None:
            self.V, self.M = torch.zeros_like(second), torch.zeros_like(unmagnified)
            self.basis = U
        P = U.T @ self.basis
        projected = P @ self.V @ P.T
        lost = torch.linalg.eigvalsh(self.V) - torch.linalg.eigvalsh(projected)
        self.rho = beta2 * (self.rho + float(lost.abs().max()))
        self.V = beta2 * projected + (1 - beta2) * second
        root = torch.from_numpy(scipy.linalg.sqrtm(self.V + self.rho * torch.eye(len(P), dtype=P.dtype)).real)
        self.M = beta1 * self.M @ P.T + (1 - beta1) * unmagnified @ torch.linalg.inv(root)
        self.basis = U
        return self.M @ torch.linalg.inv(R).T
