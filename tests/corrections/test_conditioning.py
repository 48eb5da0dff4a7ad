"""SGD near an ill-conditioned solution: the claim that the library is built on."""

from __future__ import annotations

import math
from functools import cache

import pytest

import ill_conditioned

iterations = cache(ill_conditioned.best_iterations)


@pytest.mark.parametrize("correction", ["sds-split", "scaled"])
def test_independent_of_the_condition_number(correction: str) -> None:
    assert iterations(correction, 1000) < 1.2 * iterations(correction, 10)


def test_sds_grows_with_the_square_root() -> None:
    growth = [iterations("sds", 1000) / iterations("sds", 100), iterations("sds", 100) / iterations("sds", 10)]
    for factor in growth:
        assert math.sqrt(10) / 1.5 < factor < math.sqrt(10) * 1.5


@pytest.mark.parametrize("correction", ["sds", "sds-split", "scaled"])
def test_more_than_five_times_faster_than_lora(correction: str) -> None:
    assert 5 * iterations(correction, 100) < iterations("lora", 100) < ill_conditioned.LIMIT
