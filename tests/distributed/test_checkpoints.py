"""What is saved by some processes goes on in others, as if there had been no interruption."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bodies import accelerated, checkpoints
from bodies.common import Case, State
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_resharding_from_two_processes_to_one_to_four(correction: str, pools: Pools, tmp_path: Path) -> None:
    """Loaded bit by bit; trained on to the last rounding, since sums over processes have another order."""
    case = Case(correction, torch.float64, steps=4)
    uninterrupted = pools[2].run(checkpoints.part_of_a_run, Case(correction, torch.float64, steps=12), 0, None, None)
    folders = [str(tmp_path / name) for name in ("two", "one", "four")]
    runs = [
        pools[size].run(checkpoints.part_of_a_run, case, 4 * index, folders[index - 1] if index else None, folder)
        for index, (size, folder) in enumerate(zip((2, 1, 4), folders, strict=True))
    ]
    for before, after in pairwise(runs):
        saved = before[0][1]
        assert any("exp_avg_sq" in name for name in saved)
        for loaded, _ in after:
            assert_same(loaded, saved)
    for name, expected in uninterrupted[0][1].items():
        torch.testing.assert_close(runs[2][0][1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_resuming_with_as_many_processes_is_bit_equal(correction: str, pools: Pools, tmp_path: Path) -> None:
    case, folder = Case(correction, steps=4), str(tmp_path / "saved")
    uninterrupted = pools[4].run(checkpoints.part_of_a_run, Case(correction, steps=8), 0, None, None)
    first = pools[4].run(checkpoints.part_of_a_run, case, 0, None, folder)
    second = pools[4].run(checkpoints.part_of_a_run, case, 4, folder, None)
    factor = "first.lora_A.default.weight"
    assert not torch.equal(first[0][1][factor], second[0][1][factor])
    assert_same(second[0][1], uninterrupted[0][1])


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_accelerate_resumes_bit_equal(correction: str, pools: Pools, tmp_path: Path) -> None:
    for uninterrupted, resumed in pools[2].run(accelerated.resuming, Case(correction), str(tmp_path)):
        assert_same(uninterrupted, resumed)
