"""Nothing outside changes the precision of the small matrices."""

from __future__ import annotations

import torch

from sdsopt.linalg import accurate_dtype, without_autocast


def test_float64_where_the_device_has_it() -> None:
    assert accurate_dtype(torch.device("cpu")) == torch.float64
    assert accurate_dtype(torch.device("cuda")) == torch.float64
    assert accurate_dtype(torch.device("mps")) == torch.float32


def test_autocast_is_off_inside_and_on_again_outside() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast({"cpu"}):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(set()):
            assert (x @ x).dtype == torch.bfloat16
