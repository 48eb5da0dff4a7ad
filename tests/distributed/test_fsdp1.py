"""The first FSDP flattens parameters: pairs are whole only where nothing is sharded."""

from __future__ import annotations

import pytest
import torch

from bodies import common, fsdp1
from bodies.common import Case
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_whole_factors_are_corrected(correction: str, pools: Pools) -> None:
    expected = common.alone(Case(correction))
    for state in pools[2].run(fsdp1.training, Case(correction), "NO_SHARD", True):
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("original", "error"),
    [
        (True, "PairShapeError: the factors of _fsdp_wrapped_module.first[default] are not whole"),
        (False, "NoPairsError: found no LoRA pair"),
    ],
)
def test_flat_shards_are_refused_in_favour_of_fsdp2(original: bool, error: str, pools: Pools) -> None:
    for message in pools[2].run(fsdp1.training, Case("sds"), "FULL_SHARD", original):
        assert isinstance(message, str), "it trained"
        assert message.startswith(error)
        assert "FSDP2 (torch.distributed.fsdp.fully_shard" in message
