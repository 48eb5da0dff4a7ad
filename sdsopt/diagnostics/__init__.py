"""Pure functions that measure factors and their product. None changes what it measures."""

from sdsopt.diagnostics.alignment import alignment
from sdsopt.diagnostics.balance import balance
from sdsopt.diagnostics.conditioning import condition_number, median_condition_numbers
from sdsopt.diagnostics.full_gradient import FullGradients, is_linear_pair
from sdsopt.diagnostics.product import PairSpectra, ProductSVD, pair_spectra, product_norm, product_svd
from sdsopt.diagnostics.ranks import effective_rank, stable_rank
from sdsopt.diagnostics.spectrum import gram_singular_values, singular_values

__all__ = [
    "FullGradients",
    "PairSpectra",
    "ProductSVD",
    "alignment",
    "balance",
    "condition_number",
    "effective_rank",
    "gram_singular_values",
    "is_linear_pair",
    "median_condition_numbers",
    "pair_spectra",
    "product_norm",
    "product_svd",
    "singular_values",
    "stable_rank",
]
