"""DeepSpeed ZeRO owns the optimizer: hook mode corrects, the wrapper refuses."""

from __future__ import annotations

import pytest
import torch

from bodies import deepspeeded
from bodies.common import Case
from packages import package
from process_pool import ProcessPool
from sdsopt import SDSPreconditioner
from sdsopt.errors import StaleParametersError
from toy import Network

package("deepspeed")

Pools = dict[int, ProcessPool]


@pytest.mark.parametrize(
    ("stage", "attach_first"), [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True), (3, False)]
)
def test_gradient_accumulation(stage: int, attach_first: bool, pools: Pools) -> None:
    case = Case("sds", micro=3)
    expected = deepspeeded.alone(case)
    for state in pools[2].run(deepspeeded.training, case, stage, attach_first):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, rtol=2e-6, atol=2e-6, msg=name)


def test_stage_3_communicates_nothing_more(pools: Pools) -> None:
    """The partner's weights are read when DeepSpeed has gathered them for forward."""
    for corrected, bare in pools[2].run(deepspeeded.collectives_of_stage_3, Case("sds", steps=2)):
        assert corrected == bare
        assert sum(bare.values()) > 0


def test_stage_3_refuses_what_needs_whole_factors(pools: Pools) -> None:
    for whole, early in pools[2].run(deepspeeded.refusals_of_stage_3, Case("sds")):
        assert whole.startswith("UnsupportedCorrectionError: DeepSpeed ZeRO-3 keeps the factors of first[default] in")
        assert early.startswith("StaleParametersError: DeepSpeed ZeRO-3 keeps factor")
        assert "Call attach(model) after deepspeed.initialize" in early


@pytest.mark.parametrize("stage", [1, 2])
def test_a_wrapper_that_was_replaced_is_reported(stage: int, pools: Pools) -> None:
    """By Accelerate's own function, as with `offload_optimizer`; DeepSpeed's CPU optimizer, which must be compiled, has
    a stand-in."""
    for bare, message in pools[2].run(deepspeeded.replaced, Case("sds"), stage):
        assert bare == "no error"
        assert message.startswith("UnsupportedOptimizerError: StandIn took over the param groups of SDSPreconditioner")
        assert "call sdsopt.attach(model) after deepspeed.initialize" in message


def test_flat_parameters_in_place_of_the_factors_are_noticed() -> None:
    """What ZeRO does to the optimizer that it is given."""
    network = Network()
    optimizer = SDSPreconditioner(torch.optim.SGD(network.parameters(), lr=0.05), network)
    flat = torch.nn.Parameter(torch.nn.utils.parameters_to_vector(network.parameters()).detach())
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with pytest.raises(StaleParametersError, match=r"sdsopt.attach\(model\) after deepspeed.initialize"):
        optimizer.step()
    assert torch.equal(flat, before)


class Outer(torch.optim.Optimizer):
    """Steps the one that it is given, whose param groups are its own, as Lookahead does."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside
        super().__init__(inside.param_groups, {})

    def step(self, closure: object = None) -> None:  # pyright: ignore
        self.inside.step()


def test_optimizers_that_step_the_wrapper_or_are_inside_it_do_not_replace_it() -> None:
    network = Network()
    sgd = torch.optim.SGD(network.parameters(), lr=0.05)
    optimizer = Outer(Outer(SDSPreconditioner(Outer(Outer(sgd)), network)))
    sgd_alone = torch.optim.SGD(network.parameters(), lr=0.05)
    for each in (optimizer, optimizer, sgd_alone):
        network.loss().backward()
        each.step()
