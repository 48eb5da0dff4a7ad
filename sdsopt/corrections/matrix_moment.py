"""A second moment of all pairs of coordinates, as LoRA-RITE's, before any inner optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sdsopt.corrections.base import Correction, Factors, Memory, PairTensors
from sdsopt.corrections.gram_power import GramPower
from sdsopt.corrections.wrapping import Wrapping
from sdsopt.errors import UnsupportedCorrectionError
from sdsopt.linalg import EighInverseRoot, symmetric_eigenvalues

_SDS_SPLIT = GramPower(0.5, update_exponent=0.5)
_V, _ESCAPED, _WEIGHT = "second_moment", "escaped_mass", "weight"


@final
@dataclass(frozen=True)
class MatrixMoment(Wrapping):
    r"""ĝA ← (V_A + ρ_A·I)^(-1/2)·ĝA with the r×r average V_A of ĝA·ĝAᵀ/n, and the same of B; ĝ as corrected inside.

    Around the default, `sds-split`, it is LoRA-RITE with `torch.optim.SGD(momentum=β, dampening=β)` as the inner
    optimizer: ĝA is the unmagnified gradient s·polar(B)ᵀ·G, momentum averages what it is turned into, and the step is
    mapped by M_B^(-1/2). From step to step V, ρ and the momentum follow the bases,

    $$T = \mathrm{polar}(B')^\top\mathrm{polar}(B), \qquad V_A \leftarrow T\,V_A\,T^\top, \qquad
    \rho_A \leftarrow \rho_A + \max_i |\lambda_i(V_A) - \lambda_i(T\,V_A\,T^\top)|,$$

    where ρ makes up for the mass of V that leaves the subspace, so that the step does not grow by it. It fades as V
    does.

    Every corrected gradient has coordinates of about mean square 1, as Adam's steps have, so learning rates are Adam's.
    Homogeneous of degree 0: the size of the loss does not count. From B = 0, A rests in the first step.

    Source: LoRA-RITE, arXiv 2410.20625. Averages have Adam's bias correction, as in its published code. Damping is
    relative here, and absolute there.

    State: r² + 2 numbers for each factor and block, in the optimizer's state (`sdsopt_second_moment`,
    `sdsopt_escaped_mass`, `sdsopt_weight`), in the factors' dtype. A bare optimizer ignores them.

    Cost for a pair: that of the correction inside with transport, 4·(m + n)·r² for V and its root, and six r×r
    eigendecompositions.

    Attributes:
        correction: What V is the second moment of; one with a `basis_exponent`.
        beta: Share of V that is kept in a step, in [0, 1).
        damping: Relative damping δ ≥ 0 of V.

    Raises:
        UnsupportedCorrectionError: The correction inside has no `basis_exponent`, or a second moment of its own.
        ValueError: `beta` or `damping` is out of range.
    """

    correction: Correction = _SDS_SPLIT
    beta: float = 0.999
    damping: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be in [0, 1), got {self.beta}")
        if not self.damping >= 0:
            raise ValueError(f"damping must be a number ≥ 0, got {self.damping}")
        if self.correction.basis_exponent is None:
            raise UnsupportedCorrectionError(
                f"{self.correction} gives its gradients in no basis B·M_B^(-p) (its basis_exponent is None), so their "
                "second moment would not be that of the next step's; use one that has it, such as sds-split"
            )
        if self.correction.keeps_memory:
            raise UnsupportedCorrectionError(f"{self.correction} divides by a second moment already; once is enough")

    @property
    def carries_moments(self) -> bool:
        """True: momentum and V follow the bases."""
        return True

    @property
    def keeps_memory(self) -> bool:
        """True."""
        return True

    def precondition_rows(self) -> None:
        """None: V is of whole gradients."""

    def advance(self, factors: Factors, gradients: PairTensors, memory: Memory) -> tuple[PairTensors, Memory]:
        """Corrects, adds to V, and divides by its root."""
        inside = self.correction.precondition(factors, gradients)
        new = Memory(
            A={} if inside.A is None else self._add(memory.A, inside.A),
            B={} if inside.B is None else self._add(memory.B, inside.B.mT),
        )
        corrected = PairTensors(
            A=None if inside.A is None else self._inverse_root(new.A) @ inside.A,  # (e, r, n)
            B=None if inside.B is None else inside.B @ self._inverse_root(new.B),  # (e, m, r)
        )
        return corrected, new

    def carry(self, memory: Mapping[str, Tensor], change: Tensor) -> Mapping[str, Tensor]:
        """V ← T·V·Tᵀ, and ρ grows by what that loses."""
        if not memory:
            return memory
        V = memory[_V].to(change.dtype)
        carried = _symmetric(change @ V @ change.mT)
        lost = (symmetric_eigenvalues(V) - symmetric_eigenvalues(carried)).abs().amax(-1)[:, None, None]
        return {**memory, _V: carried, _ESCAPED: memory[_ESCAPED].to(change.dtype) + lost}

    def _add(self, memory: Mapping[str, Tensor], wide: Tensor) -> Mapping[str, Tensor]:
        """Averages ĝ·ĝᵀ/n into V, for ĝ (e, r, n)."""
        new = wide @ wide.mT / wide.shape[-1]
        if not memory:
            one = torch.ones_like(new[:, :1, :1])
            memory = {_V: torch.zeros_like(new), _ESCAPED: 0 * one, _WEIGHT: 0 * one}
        old = {name: self.beta * tensor.to(new.dtype) for name, tensor in memory.items()}
        # The weight is what Adam's bias correction divides by: 1 - βᵗ.
        return {_V: old[_V] + (1 - self.beta) * new, _ESCAPED: old[_ESCAPED], _WEIGHT: old[_WEIGHT] + (1 - self.beta)}

    def _inverse_root(self, memory: Mapping[str, Tensor]) -> Tensor:
        identity = torch.eye(memory[_V].shape[-1], dtype=memory[_V].dtype, device=memory[_V].device)
        averages = (memory[_V] + memory[_ESCAPED] * identity) / memory[_WEIGHT]
        [root], _ = EighInverseRoot().compute(averages, (0.5,), self.damping)
        return root


def _symmetric(matrices: Tensor) -> Tensor:
    return (matrices + matrices.mT) / 2
