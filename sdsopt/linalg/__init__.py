"""Batched inverse roots of r×r Gram matrices. Knows nothing of LoRA."""

from sdsopt.linalg.balance import balancing_transform
from sdsopt.linalg.base import InverseRoot, RootResult, RootStatus
from sdsopt.linalg.eigh import EighInverseRoot
from sdsopt.linalg.precision import accurate_dtype, without_autocast
from sdsopt.linalg.registry import available_inverse_roots, make_inverse_root
from sdsopt.linalg.svd import SVDInverseRoot

__all__ = [
    "EighInverseRoot",
    "InverseRoot",
    "RootResult",
    "RootStatus",
    "SVDInverseRoot",
    "accurate_dtype",
    "available_inverse_roots",
    "balancing_transform",
    "make_inverse_root",
    "without_autocast",
]
