"""Replicas that never part, and optimizers that share their state out."""

from __future__ import annotations

import pytest
import torch

from bodies import common, ddp
from bodies.common import Case
from process_pool import ProcessPool

Pools = dict[int, ProcessPool]


@pytest.mark.parametrize(
    ("body", "correction"),
    [(ddp.training, "sds"), (ddp.training, "sds-split"), (ddp.training, "scaled"), (ddp.hooks, "sds")],
)
def test_replicas_are_bit_identical_for_200_steps(body: object, correction: str, pools: Pools) -> None:
    case = Case(correction, steps=200)
    start = common.whole(common.network(case))
    first, *others = pools[4].run(body, case)  # pyright: ignore
    for name, tensor in first.items():
        assert tensor.isfinite().all()
        assert not torch.equal(tensor, start[name])
        for other in others:
            assert torch.equal(other[name], tensor), name


def test_replicas_compute_roots_in_the_same_steps(pools: Pools) -> None:
    """Whatever only one of them has done to its factors meanwhile."""
    first, other = pools[2].run(ddp.first_one_evaluates_others, Case("sds", options=(("update_every", 10),), steps=6))
    for name, tensor in first.items():
        assert torch.equal(other[name], tensor), name


@pytest.mark.parametrize("correction", ["sds", "scaled"])
def test_hook_mode_equals_one_process(correction: str, pools: Pools) -> None:
    case = Case(correction, micro=3)
    expected = common.alone(case)
    for state in pools[2].run(ddp.hooks, case):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("correction", ["sds", "sds-split", "scaled"])
def test_around_zero_redundancy_optimizer(correction: str, pools: Pools) -> None:
    case = Case(correction)
    expected = common.alone(case)
    for state in pools[2].run(ddp.around_zero, case):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


def test_inside_zero_redundancy_optimizer_is_refused(pools: Pools) -> None:
    for message in pools[2].run(ddp.inside_zero, Case("sds")):
        assert message.startswith("UnsupportedOptimizerError: ZeroRedundancyOptimizer gives the optimizer that it")
        assert "SDSPreconditioner(ZeroRedundancyOptimizer(…), model)" in message
