"""PEFT on a model that transformers has split by its plan, and a mesh of two dimensions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bodies import tensor_parallel
from bodies.common import Case
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


def test_pairs_are_plain_on_one_side_and_split_on_the_other(pools: Pools, llama: Path) -> None:
    for placements in pools[2].run(tensor_parallel.llama_placements, Case(), str(llama)):
        for name, placement in placements.items():
            rowwise = "o_proj" in name or "down_proj" in name
            split = "lora_A" in name if rowwise else "lora_B" in name
            assert placement == (f"(Shard(dim={int(rowwise)}),)" if split else "plain"), name
        assert len(placements) == 2 * 2 * 7


@pytest.mark.parametrize(("correction", "count"), [("sds", 1), ("scaled", 1), ("sds-split", 2)])
def test_all_pairs_share_one_all_reduce(correction: str, count: int, pools: Pools, llama: Path) -> None:
    for names in pools[2].run(tensor_parallel.llama_collectives, Case(correction), str(llama)):
        assert names == ["all_reduce"] * count


def test_clipping_mixed_parameters(pools: Pools, llama: Path) -> None:
    case = Case("sds", options=(("max_grad_norm", 0.01),))
    expected = tensor_parallel.llama_training(case, str(llama))
    for state in pools[2].run(tensor_parallel.llama_training, case, str(llama)):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def test_a_mesh_of_two_dimensions_sums_over_each(pools: Pools) -> None:
    """The factors that are cut over both are summed over one group of processes after the other."""
    for calls in pools[4].run(tensor_parallel.mesh_collectives, Case("sds")):
        assert [name for name, _ in calls] == ["all_to_all_single", "all_reduce", "all_reduce", "all_to_all_single"]
        sums = sorted(size for name, size in calls if name == "all_reduce")
        gram = {"first": 4 * 4 * 8, "second": 3 * 3 * 8}
        present = 2 * 8  # one number for each A
        assert sums == [gram["first"] + gram["second"], 2 * (gram["first"] + gram["second"]) + present]
