"""The polar factor of long matrices."""

from __future__ import annotations

from torch import Tensor

from sdsopt.linalg.eigh import EighInverseRoot
from sdsopt.linalg.products import multiply_right


def polar_factor(matrices: Tensor, damping: float) -> Tensor:
    r"""Returns $X (X^\top X + \delta\,\lambda_{\max} I)^{-1/2}$: all singular values become 1, and zeros stay zero.

    The damping decides what counts as zero. A singular value of √δ times the largest becomes 0.7; of rounding noise
    far below that nothing is left.

    Cost: 2·d·r² for the products and about 9·r³ for the decomposition. Never raises on non-finite input.

    Args:
        matrices: (k, d, r). Wide ones (d < r) cost more than their transposes.
        damping: Relative damping δ ≥ 0.

    Returns:
        (k, d, r) of the same dtype. A non-finite matrix gives NaN.
    """
    root = EighInverseRoot()
    [inverse_roots], _ = root.compute(root.reduce(matrices), (0.5,), damping)
    return multiply_right(matrices, inverse_roots)
