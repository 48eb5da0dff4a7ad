"""AltLoRA: one factor at a time, and a momentum that is projected on the other's new subspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from sdsopt.corrections.base import Correction, Factors, PairTensors


@final
@dataclass(frozen=True)
class AltLoRA(Correction):
    r"""gA ← M_B⁻¹·gA/s² in one step and gB ← gB·M_A⁻¹/s² in the next, B first.

    Each is the gradient of its factor that fits the full gradient best while the other factor stands still:
    gA/s² minimises ‖s·B·X − G‖. Between two steps of a factor the other one has moved; its momentum is then replaced
    by the one that fits what it stood for best, m_A ← M_{B'}⁻¹·B'ᵀB·m_A, which is `basis_change` with p = 1.

    The paper's Algorithm 1 is SGD with `momentum=β, dampening=β` inside; AdamW inside makes it AltLoRA+, where the
    second moments are carried too (its published code leaves them in the old coordinates). Learning rates, schedules
    and weight decay are the inner optimizer's; the factor that waits is not decayed. From B = 0 the first steps of A
    are as large as those of `scaled`: warm the learning rate up.

    Source: AltLoRA (arXiv 2505.12455). Its code damps by a fixed multiple of I; here damping is relative. A step costs
    as much as one of `scaled`; carrying momentum doubles the r×r work.

    Attributes:
        every: For how many steps a factor has its turn.
        project_momentum: Whether the momentum is projected; then the inner optimizer must be one whose moments sdsopt
            knows, such as SGD or AdamW.

    Raises:
        ValueError: `every` is below 1.
    """

    every: int = 1
    project_momentum: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be a number of steps ≥ 1, got {self.every}")

    @property
    def gram_exponents(self) -> tuple[float, ...]:
        return (1.0,)

    @property
    def uses_step(self) -> bool:
        return True

    @property
    def basis_exponent(self) -> float:
        return 1.0

    @property
    def carries_moments(self) -> bool:
        return self.project_momentum

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        """Corrects the gradient of the factor whose turn it is, and keeps the other one from stepping."""
        # Where one is frozen, it is always the other's turn.
        waiting = None if gradients.A is None or gradients.B is None else "B" if factors.step // self.every % 2 else "A"
        s = factors.scaling or 1.0
        return PairTensors(
            A=None if gradients.A is None or waiting == "A" else factors.roots_B[1.0] @ gradients.A / s**2,
            B=None if gradients.B is None or waiting == "B" else gradients.B @ factors.roots_A[1.0] / s**2,
        )
