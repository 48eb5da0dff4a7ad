"""DeepSpeed, which owns the optimizer: hooks see whole gradients of each process before it shards them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

import deepspeed_workers
import distributed_workers as workers
from packages import package
from sdsopt import SDSPreconditioner
from sdsopt.errors import StaleParametersError
from toy import Network

# Slow, since its first run on a machine compiles an extension.


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "1", "2"])
def test_hooks_equal_the_wrapper_on_the_whole_batch(stage: str, tmp_path: Path) -> None:
    package("deepspeed")
    multiprocessing.spawn(workers.run, (2, str(tmp_path), deepspeed_workers.hooks, stage), nprocs=2)
    alone, plain = Network(), Network()
    for model, corrected in ((alone, True), (plain, False)):
        optimizer = deepspeed_workers.sgd(model)
        optimizer = SDSPreconditioner(optimizer, model) if corrected else optimizer
        for step in range(workers.STEPS):
            optimizer.zero_grad()
            model(workers.batch(step).float()).square().mean().backward()
            optimizer.step()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, expected in alone.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(expected, plain.state_dict()[name], rtol=1e-3) or "head" in name


@pytest.mark.slow
def test_what_cannot_be_corrected_is_refused(tmp_path: Path) -> None:
    """Hooks at stage 3, where the partner is sharded, and the wrapper at stages 1 to 3."""
    package("deepspeed")
    multiprocessing.spawn(workers.run, (2, str(tmp_path), deepspeed_workers.mistakes), nprocs=2)
    for rank in (0, 1):
        hooks, wrapper = (tmp_path / f"{rank}.txt").read_text().splitlines()
        assert "PairShapeError: the factors of first[default] are not whole matrices" in hooks
        assert "StaleParametersError: the optimizer no longer holds any of the 4 LoRA factors" in wrapper


def test_flat_parameters_in_place_of_the_factors_are_noticed() -> None:
    """What ZeRO does to the optimizer that it is given."""
    network = Network()
    optimizer = SDSPreconditioner(deepspeed_workers.sgd(network), network)
    flat = torch.nn.Parameter(torch.nn.utils.parameters_to_vector(network.parameters()).detach())
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with pytest.raises(StaleParametersError, match=r"sdsopt.attach\(model\) before deepspeed.initialize"):
        optimizer.step()
    assert torch.equal(flat, before)
