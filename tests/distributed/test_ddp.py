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


@pytest.mark.parametrize("correction", ["sds", "scaled"])
def test_hook_mode_equals_one_process(correction: str, pools: Pools) -> None:
    case = Case(correction, micro=3)
    expected = common.alone(case)
    for state in pools[2].run(ddp.hooks, case):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("body", [ddp.around_zero, ddp.inside_zero])
@pytest.mark.parametrize("correction", ["sds", "sds-split", "scaled"])
def test_with_zero_redundancy_optimizer(correction: str, body: object, pools: Pools) -> None:
    """Inside it is exact as well: a factor's correction takes the partner's weights, which every process has."""
    case = Case(correction)
    expected = common.alone(case)
    for state in pools[2].run(body, case):  # pyright: ignore
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (("max_grad_norm", 0.1), "clips by the norm of its own part"),
        (("correction", ddp.NeedsBoth()), "NeedsBoth() needs both gradients"),
    ],
)
def test_what_needs_all_gradients_is_refused_inside_zero(option: tuple[str, object], why: str, pools: Pools) -> None:
    for message in pools[2].run(ddp.inside_zero, Case("sds", options=(option,))):
        assert message.startswith("UnsupportedOptimizerError: "), message
        assert why in message
        assert "SDSPreconditioner(ZeroRedundancyOptimizer(…), model)" in message
