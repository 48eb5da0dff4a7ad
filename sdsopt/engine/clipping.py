"""Clipping the gradients of a step together, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from sdsopt.linalg import accurate_dtype
from sdsopt.sharding import Axes, Distribution, add_up, is_distributed


def clip(parameters: Sequence[Parameter], max_norm: float) -> None:
    """Clips the gradients of these parameters in place, as `torch.nn.utils.clip_grad_norm_` does.

    torch's own takes no mixture of plain and distributed parameters, nor several meshes.

    Args:
        parameters: Parameters with gradients.
        max_norm: The largest norm of all gradients together.
    """
    if not any(map(is_distributed, parameters)):
        clip_grad_norm_(parameters, max_norm)
        return
    parts = [(Distribution.of(p, Axes(tuple(range(p.ndim)))), p.grad) for p in parameters if p.grad is not None]
    gradients = [where.local(gradient) for where, gradient in parts]
    dtype = accurate_dtype(gradients[0].device)
    norms = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient in gradients]
    squares = add_up([(where.sums, norm.square()) for (where, _), norm in zip(parts, norms, strict=True)])
    total = torch.stack([square.to(gradients[0].device) for square in squares]).sum().sqrt()
    share = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share.to(gradient))
