"""Batched functions of r×r Gram matrices, inverse roots above all. Knows nothing of LoRA."""

from sdsopt.linalg.auto import AutoInverseRoot
from sdsopt.linalg.balance import balancing_transform
from sdsopt.linalg.base import InverseRoot, RootResult, RootStatus
from sdsopt.linalg.eigh import EighInverseRoot
from sdsopt.linalg.native import use_native_products
from sdsopt.linalg.newton_schulz import NewtonSchulzInverseRoot
from sdsopt.linalg.polar import polar_factor
from sdsopt.linalg.precision import accurate_dtype, without_autocast
from sdsopt.linalg.products import gram, multiply_left, multiply_right
from sdsopt.linalg.registry import available_inverse_roots, make_inverse_root
from sdsopt.linalg.spectrum import symmetric_eigenvalues
from sdsopt.linalg.svd import SVDInverseRoot
from sdsopt.linalg.sylvester import solve_sylvester
from sdsopt.linalg.workspace import copied, empty_result, workspace

__all__ = [
    "AutoInverseRoot",
    "EighInverseRoot",
    "InverseRoot",
    "NewtonSchulzInverseRoot",
    "RootResult",
    "RootStatus",
    "SVDInverseRoot",
    "accurate_dtype",
    "available_inverse_roots",
    "balancing_transform",
    "copied",
    "empty_result",
    "gram",
    "make_inverse_root",
    "multiply_left",
    "multiply_right",
    "polar_factor",
    "solve_sylvester",
    "symmetric_eigenvalues",
    "use_native_products",
    "without_autocast",
    "workspace",
]
