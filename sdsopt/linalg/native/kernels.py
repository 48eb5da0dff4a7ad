"""The compiled products as functions of tensors."""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sdsopt.linalg.native.build import build
from sdsopt.linalg.workspace import empty_result

_DTYPES = (torch.float32, torch.bfloat16)
# Measured beside torch's products (MKL): below rank 8 most of a vector is empty, and above rank 64 a root no longer
# fits where it is read from.
_GRAM_RANKS = range(8, 513)
_MULTIPLY_RANKS = range(8, 65)

_active: Kernels | None = None


def use_native_products(enabled: bool = True) -> None:
    """Makes corrections on the CPU use products that are compiled for this processor, or torch's again.

    The first call compiles a small C file with the system's compiler, into ``~/.cache/sdsopt`` (or ``XDG_CACHE_HOME``).
    Results differ from torch's by rounding in float64. It holds for the whole process, for contiguous float32 and
    bfloat16 factors; under `torch.compile` and on other devices torch's own products stay in use.

    Args:
        enabled: Whether to use them.

    Raises:
        NativeBuildError: There is no C compiler, or it failed.
    """
    global _active
    _active = Kernels(ctypes.CDLL(str(build()))) if enabled else None


def kernels_for(tensor: Tensor) -> Kernels | None:
    """Returns the kernels, where they are in use and take such a tensor."""
    # Autograd sees nothing of what is compiled.
    if _active is None or torch.compiler.is_compiling() or (torch.is_grad_enabled() and tensor.requires_grad):
        return None
    plain = type(tensor) in (Tensor, Parameter) and tensor.device.type == "cpu" and tensor.dtype in _DTYPES
    return _active if plain and (tensor.is_contiguous() or tensor.mT.is_contiguous()) else None


class Kernels:
    """The functions of `products.c`, for tensors that `kernels_for` let through.

    Args:
        library: The compiled library.
    """

    def __init__(self, library: Any) -> None:
        self._gram, self._multiply = library.sdsopt_gram, library.sdsopt_multiply
        pointer, long, int_ = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        self._gram.argtypes = [pointer, long, long, long, int_, int_, pointer, int_]
        self._multiply.argtypes = [pointer, long, long, long, int_, pointer, int_, pointer, int_]

    def gram(self, factor: Tensor) -> Tensor | None:
        """Returns XᵀX (..., r, r) in float64 for X (..., d, r); None for a rank that is left to torch."""
        rank = factor.shape[-1]
        if rank not in _GRAM_RANKS:
            return None
        out = torch.empty(*factor.shape[:-2], rank, rank, dtype=torch.float64)
        half = factor.dtype == torch.bfloat16
        shape = _describe(factor, -1)
        self._check(self._gram(factor.data_ptr(), *shape, half, out.data_ptr(), torch.get_num_threads()))
        return out

    def multiply_left(self, matrix: Tensor, tensor: Tensor) -> Tensor | None:
        """Returns M·X (..., r, n), in X's dtype and strides; None where torch's product is as fast."""
        return self._product(tensor, -2, matrix, transposed=True)

    def multiply_right(self, tensor: Tensor, matrix: Tensor) -> Tensor | None:
        """Returns X·M (..., m, r), likewise."""
        return self._product(tensor, -1, matrix, transposed=False)

    def _product(self, tensor: Tensor, rank_dim: int, matrix: Tensor, *, transposed: bool) -> Tensor | None:
        # In bfloat16, torch's products in float32 are exact enough and faster.
        if tensor.shape[rank_dim] not in _MULTIPLY_RANKS or tensor.dtype != torch.float32:
            return None
        if matrix.dtype != torch.float64 or not matrix.is_contiguous() or matrix.shape[:-2] != tensor.shape[:-2]:
            return None
        if torch.is_grad_enabled() and matrix.requires_grad:
            return None
        out = empty_result(tensor)
        shape = _describe(tensor, rank_dim)
        pointers = matrix.data_ptr(), transposed, out.data_ptr()
        self._check(self._multiply(tensor.data_ptr(), *shape, *pointers, torch.get_num_threads()))
        return out

    def _check(self, code: int) -> None:
        if code:
            raise MemoryError("no memory for a buffer of a few megabytes")


def _describe(factor: Tensor, rank_dim: int) -> tuple[int, int, int, bool]:
    """Blocks, length, rank, and whether the long dimension is the contiguous one."""
    length, rank = factor.shape[-3 - rank_dim], factor.shape[rank_dim]
    blocks = prod(factor.shape[:-2])
    return blocks, length, rank, (rank_dim == -1) != factor.is_contiguous()
