"""Pure functions that measure factors and their product. None changes what it measures."""

from sdsopt.diagnostics.alignment import alignment
from sdsopt.diagnostics.balance import balance
from sdsopt.diagnostics.conditioning import condition_number, median_condition_numbers
from sdsopt.diagnostics.full_gradient import FullGradients, is_linear_pair
from sdsopt.diagnostics.product import ProductSVD, product_norm, product_svd
from sdsopt.diagnostics.ranks import effective_rank, stable_rank
from sdsopt.diagnostics.spectrum import singular_values

__all__ = [
    "FullGradients",
    "ProductSVD",
    "alignment",
    "balance",
    "condition_number",
    "effective_rank",
    "is_linear_pair",
    "median_condition_numbers",
    "product_norm",
    "product_svd",
    "singular_values",
    "stable_rank",
]
