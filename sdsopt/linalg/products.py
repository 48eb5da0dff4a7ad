"""The products that pass over whole factors and gradients. All other linear algebra here is r×r."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdsopt.linalg.native import kernels_for
from sdsopt.linalg.precision import accurate_dtype
from sdsopt.linalg.workspace import copied, empty_result, part_bytes

# How much of a long tensor is converted at once: on a CPU what stays in its cache, elsewhere what keeps a GPU busy.
_CPU_BYTES = 2 * 2**20
_DEVICE_BYTES = 256 * 2**20


def gram(factor: Tensor) -> Tensor:
    """Forms the Gram matrix XᵀX in `accurate_dtype`, whatever the dtype of X.

    Args:
        factor: X (..., d, r).

    Returns:
        (..., r, r). A long X is converted part by part, so that at most a few megabytes are needed beside it.
    """
    kernels = kernels_for(factor)
    if kernels is not None and (result := kernels.gram(factor)) is not None:
        return result
    dtype = accurate_dtype(factor.device)
    parts = _parts(factor, -2, dtype)
    first = _converted(parts[0], dtype)
    total = first.mT @ first
    for part in parts[1:]:
        converted = _converted(part, dtype)
        total += converted.mT @ converted
    return total


def multiply_left(matrix: Tensor, tensor: Tensor) -> Tensor:
    """Returns M·X in X's own dtype, computed in `product_dtype` and rounded once.

    Args:
        matrix: M (..., r, r).
        tensor: X (..., r, n).
    """
    kernels = kernels_for(tensor)
    if kernels is not None and (result := kernels.multiply_left(matrix, tensor)) is not None:
        return result
    return _in_parts(tensor, -1, matrix, lambda m, part: m @ part)


def multiply_right(tensor: Tensor, matrix: Tensor) -> Tensor:
    """Returns X·M in X's own dtype, computed in `product_dtype` and rounded once.

    Args:
        tensor: X (..., m, r).
        matrix: M (..., r, r).
    """
    kernels = kernels_for(tensor)
    if kernels is not None and (result := kernels.multiply_right(tensor, matrix)) is not None:
        return result
    return _in_parts(tensor, -2, matrix, lambda m, part: part @ m)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which a product with a root is exact to the last place of the tensor's own dtype.

    The root of a factor with condition number κ multiplies rounding errors by κ. float32 leaves enough beyond the 8 or
    11 bits of bfloat16 and float16; float32 itself needs float64 (`benchmarks/precision.py`).
    """
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return torch.float32
    return accurate_dtype(tensor.device)


def _in_parts(tensor: Tensor, dim: int, matrix: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    dtype = product_dtype(tensor)
    matrix = matrix.to(dtype)
    parts = _parts(tensor, dim, dtype)
    if len(parts) == 1 and tensor.is_contiguous():
        exact = product(matrix, tensor.to(dtype))
        return exact if tensor.dtype == dtype else copied(exact, tensor.dtype)
    result = empty_result(tensor)  # with its strides, so that it goes back to where it came from without a copy
    for part, target in zip(parts, result.split(parts[0].shape[dim], dim), strict=True):
        target.copy_(product(matrix, _converted(part, dtype)))
    return result


def _converted(part: Tensor, dtype: torch.dtype) -> Tensor:
    # Stacked experts have every element of a matrix in another place: products of that are several times as slow.
    rows_or_columns_apart = part.stride(-1) != 1 and part.stride(-2) != 1
    return (part.contiguous() if rows_or_columns_apart else part).to(dtype)


def _parts(tensor: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    limit = part_bytes(_CPU_BYTES if tensor.device.type == "cpu" else _DEVICE_BYTES)
    length = tensor.shape[dim]
    bytes_per_index = tensor.numel() // max(length, 1) * dtype.itemsize
    return tensor.split(max(1, min(length, limit // max(bytes_per_index, 1))), dim)
