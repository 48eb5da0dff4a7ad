"""Inverse roots by matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from sdsopt.linalg.base import InverseRoot, RootResult, RootStatus
from sdsopt.linalg.eigh import EighInverseRoot
from sdsopt.linalg.products import gram
from sdsopt.linalg.spectrum import replace_non_finite

# λmax is the mean of the eigenvalues, each weighed by this power of itself: exact unless others lie within 1e-4 of it,
# and then off by less than they do.
_SQUARINGS = 14
# Added to what bounds the spectrum from above, so that no such error lets an eigenvalue out of the interval.
_MARGIN = 0.01
# Rounding leaves eigenvalues of a singular Gram matrix this far below zero, in units of eps·λmax.
_ROUNDING = 16


@final
@dataclass(frozen=True)
class NewtonSchulzInverseRoot(InverseRoot):
    r"""The coupled Newton-Schulz iteration Y → Y·T, Z → T·Z with T = ρ·(3·I − ρ²·Z·Y)/2, from Y = M and Z = I.

    Y tends to $M^{1/2}$ and Z to $M^{-1/2}$. The damping is a lower bound of the spectrum that is known beforehand,
    so the scaling ρ that is best for each step is too, and with it the number of steps (11 for δ = 1e-6): nothing has
    to be asked of the device. Source: Chen and Chow, "A stable scaling of Newton-Schulz" (2014).

    Cost: 14 products of r×r matrices for λmax, and 3 for each step. Exponents that are no multiple of 1/2 are left to
    `EighInverseRoot`.

    In float64 its relative error is about 1e-11 + 1e-15·cond(M), which float32 gradients do not notice. A matrix on
    which it did not converge, which takes rounding errors larger than the damping, gives a multiple of the identity:
    the gradient keeps its direction (`RootStatus.FALLBACK`).
    """

    def reduce(self, factor: Tensor) -> Tensor:
        """Forms the Gram matrix XᵀX, (..., d, r) → (..., r, r)."""
        return gram(factor)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        """Iterates on Gram matrices (k, r, r); see `InverseRoot.compute`."""
        if any(exponent % 0.5 for exponent in exponents):
            return EighInverseRoot().compute(reduced, exponents, damping)
        matrices, finite = replace_non_finite(reduced)
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        largest = _largest_eigenvalue(matrices)  # (k, 1, 1)
        zero = largest <= 0
        # Without a floor δ = 0 would divide by zero where a direction carries no information.
        shift = max(damping, _ROUNDING * torch.finfo(matrices.dtype).eps)
        scale = torch.where(zero, 1.0, largest * ((1 + _MARGIN) * (1 + shift)))
        damped = torch.where(zero, identity, (matrices + shift * largest * identity) / scale)  # spectrum in (0, 1]
        root, inverse = _square_roots(damped, lower=shift / ((1 + _MARGIN) * (1 + shift)))

        error = (inverse @ root - identity).abs().amax((-2, -1), keepdim=True)
        converged = error < 0.1  # NaN is not
        powers = {0.5: inverse, -0.5: root, 1.0: inverse @ inverse, -1.0: damped}
        roots: list[Tensor] = []
        for exponent in exponents:
            found = powers[exponent] if exponent in powers else torch.linalg.matrix_power(inverse, round(2 * exponent))
            found = torch.where(converged, found, identity) * scale.pow(-exponent)
            roots.append(torch.where(finite.view(-1, 1, 1), found, torch.nan))

        status = torch.where(converged, RootStatus.OK.value, RootStatus.FALLBACK.value)
        status = torch.where(zero, RootStatus.ZERO.value, status).flatten()
        status = torch.where(finite, status, RootStatus.NON_FINITE.value)
        return RootResult(tuple(roots), status.to(torch.uint8))


def _largest_eigenvalue(matrices: Tensor) -> Tensor:
    """Returns λmax (k, 1, 1) of positive semidefinite matrices, 0 for a zero one."""
    power = matrices / _trace(matrices).clamp(min=torch.finfo(matrices.dtype).tiny)
    for _ in range(_SQUARINGS):
        power = power @ power
        power = power / _trace(power).clamp(min=torch.finfo(matrices.dtype).tiny)
    return (power * matrices).sum((-2, -1), keepdim=True)  # the trace of their product: both are symmetric


def _square_roots(matrices: Tensor, lower: float) -> tuple[Tensor, Tensor]:
    """Returns M^(1/2) and M^(-1/2) of matrices whose eigenvalues lie between `lower` and 1."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    root, inverse = matrices, identity.expand_as(matrices)
    for step, rho in enumerate(_scalings(math.sqrt(lower), torch.finfo(matrices.dtype).eps)):
        product = inverse @ root if step else root
        factor = 1.5 * rho * identity - 0.5 * rho**3 * product
        root, inverse = root @ factor, factor @ inverse if step else factor
    return root, inverse


def _scalings(lower: float, eps: float) -> list[float]:
    """The ρ of each step: x → ρ·x·(3 − ρ²·x²)/2 maps [lower, 1] into itself, as far up as a cubic can."""
    scalings: list[float] = []
    while 1 - lower > math.sqrt(eps) / 4:  # after one step more the error is its square
        rho = math.sqrt(3 / (1 + lower + lower**2))
        lower = rho * lower * (3 - rho**2 * lower**2) / 2
        scalings.append(rho)
    return [*scalings, 1.0]


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)  # (k, 1, 1)
