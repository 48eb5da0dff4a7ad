"""The layer: a low-rank update whose factors get their gradients through orthonormal bases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from sdsopt.linalg import accurate_dtype


class SDSLinear(nn.Module):
    r"""y = base(x) + x·ΔWᵀ with ΔW = s·(Q_B·A + B·Q_A), where Q_B (m, r) and Q_A (r, n) are orthonormal constants.

    So ∂L/∂A = s·Q_BᵀG and ∂L/∂B = s·G·Q_Aᵀ: the singular values of the factors have no part in it. Until `split` is
    called it is a plain LoRA layer, ΔW = s·B·A.

    | | keeps | changes |
    |---|---|---|
    | `split` | ΔW, up to rounding | A, B and the bases; so what an optimizer remembers of A and B is void |
    | `refresh` | A, B and what an optimizer remembers of them | the bases, and ΔW with them |

    Refreshing adds s·(Q_B' - Q_B)·A + s·B·(Q_A' - Q_A) to ΔW. Right after `split` that is zero; later it is as large as
    the steps since the last refresh: what these did outside of the old subspaces then counts twice. Re-implementations
    do the same, and the paper's analysis leaves it out.

    Args:
        base: The frozen layer, called as it is.
        A: (r, n), trained.
        B: (m, r), trained.
        scaling: s; the paper takes α/√r.
        dropout: Applied to the input of the update; None for none.

    Raises:
        ValueError: The factors do not fit together, or the rank exceeds a dimension: there is no such basis then.
    """

    Q_A: Tensor
    Q_B: Tensor

    def __init__(
        self, base: nn.Module, A: Parameter, B: Parameter, scaling: float, dropout: nn.Module | None = None
    ) -> None:
        super().__init__()
        rank, columns = A.shape
        if B.shape[1] != rank or rank > min(columns, B.shape[0]):
            raise ValueError(
                f"A is {tuple(A.shape)} and B is {tuple(B.shape)}: they need one rank, and one that exceeds neither "
                "the layer's inputs nor its outputs"
            )
        self.base = base
        self.A = A
        self.B = B
        self.scaling = scaling
        self.dropout = nn.Identity() if dropout is None else dropout
        self.register_buffer("Q_A", torch.zeros_like(A, requires_grad=False))
        self.register_buffer("Q_B", torch.zeros_like(B, requires_grad=False))
        self.is_split = False

    @classmethod
    def around(cls, linear: nn.Linear, rank: int, alpha: float) -> SDSLinear:
        """Freezes a linear layer and puts an update around it, initialised as LoRA's and scaled by α/√r.

        Args:
            linear: (m, n).
            rank: r.
            alpha: α.
        """
        linear.requires_grad_(False)
        like = linear.weight
        A = Parameter(torch.empty(rank, linear.in_features, dtype=like.dtype, device=like.device))
        B = Parameter(torch.zeros(linear.out_features, rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        return cls(linear, A, B, alpha / math.sqrt(rank))

    @property
    def delta(self) -> Tensor:
        """ΔW (m, n), at present."""
        A, B = self.as_lora()
        return self.scaling * B @ A

    def as_lora(self) -> tuple[Tensor, Tensor]:
        """Returns plain LoRA factors of the same ΔW and scaling: A (k, n) and B (m, k), with k = 2r after the split."""
        A, B = self.A.detach(), self.B.detach()
        if not self.is_split:
            return A, B
        return torch.cat([A, self.Q_A]), torch.cat([self.Q_B, B], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        base: Tensor = self.base(x)
        x = self.dropout(x).to(self.A.dtype)
        inner = F.linear(x, self.A)
        if self.is_split:
            update = F.linear(inner, self.Q_B) + F.linear(F.linear(x, self.Q_A), self.B)
        else:
            update = F.linear(inner, self.B)
        return base + (self.scaling * update).to(base.dtype)

    @torch.no_grad()
    def split(self) -> None:
        """Goes from ΔW = s·B·A to the same ΔW = U·S·Vᵀ in two halves: A = (S/2s)·Vᵀ, B = U·(S/2s), Q_B = U, Q_A = Vᵀ.

        Raises:
            RuntimeError: It is split already.
        """
        if self.is_split:
            raise RuntimeError("this layer is split already; a second split would halve what its factors have learnt")
        dtype = accurate_dtype(self.A.device)
        left, R = torch.linalg.qr(self.B.to(dtype))  # (m, r), (r, r)
        right, L = torch.linalg.qr(self.A.mT.to(dtype))  # (n, r), (r, r)
        U, singular_values, Vt = torch.linalg.svd(R @ L.mT)  # of B·A, without forming it
        Q_B, Q_A = left @ U, Vt @ right.mT
        self.Q_A.copy_(Q_A)
        self.Q_B.copy_(Q_B)
        self.A.copy_(singular_values[:, None] / 2 * Q_A)
        self.B.copy_(Q_B * singular_values / 2)
        self.is_split = True

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes the bases those of the present A and B, by QR, each direction with the sign nearest to its old one."""
        if self.is_split:
            self.Q_A.copy_(_aligned_basis(self.A.mT, self.Q_A.mT).mT)
            self.Q_B.copy_(_aligned_basis(self.B, self.Q_B))

    # Whether it is split decides on what the saved factors mean, so it is saved with them.

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.is_split)

    def set_extra_state(self, state: Tensor) -> None:
        self.is_split = bool(state)

    def extra_repr(self) -> str:
        return f"rank={len(self.A)}, scaling={self.scaling:.4g}, {'split' if self.is_split else 'plain LoRA so far'}"


def _aligned_basis(factor: Tensor, old: Tensor) -> Tensor:
    """Returns an orthonormal basis (d, r) of a factor's columns, given the one before."""
    basis = torch.linalg.qr(factor.to(accurate_dtype(factor.device))).Q
    return torch.where((basis * old).sum(0) < 0, -basis, basis)
