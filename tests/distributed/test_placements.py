"""Factors are corrected wherever they lie."""

from __future__ import annotations

import pytest

from bodies import placements
from process_pool import ProcessPool


@pytest.mark.parametrize("correction", ["sds", "sds-split", "scaled", "whole"])
def test_every_view_in_every_placement(correction: str, pools: dict[int, ProcessPool]) -> None:
    for errors in pools[4].run(placements.errors, correction):
        assert len(errors) == 6 * (16 + 18) - 6 * 1
        wrong = {where: error for where, error in errors.items() if not error < 1e-9}
        assert not wrong


def test_a_diagonal_between_the_factors(pools: dict[int, ProcessPool]) -> None:
    for errors in pools[4].run(placements.errors_with_a_diagonal):
        assert len(errors) == 2
        assert max(errors) < 1e-12
