"""Optimizers that take gradients during backward: refused inside, and reached by hook mode instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import sdsopt
from sdsopt import SDSPreconditioner
from sdsopt.errors import UnsupportedOptimizerError
from toy import Network, assert_same, train

WAY_OUT = r"takes the gradients during backward.*sdsopt\.attach\(model\)"


def offload(model: Network) -> Any:
    """Without its construction, which needs an accelerator."""
    del model
    cls = pytest.importorskip("torchao.optim", exc_type=ImportError).CPUOffloadOptimizer
    return cls.__new__(cls)


def lomo(model: Network) -> Any:
    return pytest.importorskip("pytorch_optimizer", exc_type=ImportError).LOMO(model, lr=0.1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [offload, lomo])
def test_refused(make: Callable[[Network], Any]) -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match=WAY_OUT):
        SDSPreconditioner(make(model), model)


def test_lomo_under_hook_mode_is_sgd_inside_the_wrapper() -> None:
    """It steps as soon as backward has accumulated a gradient."""
    model, reference, plain = Network(), Network(), Network()
    lomo(model)
    with sdsopt.attach(model):
        for step in range(3):
            model.loss(step).backward()
    train(reference, SDSPreconditioner(SGD(reference.parameters(), lr=0.1), reference), 3)
    assert_same(model, reference)
    train(plain, SGD(plain.parameters(), lr=0.1), 3)
    assert not torch.allclose(model.first.A, plain.first.A)


def test_gradients_are_copied_away_corrected_under_hook_mode() -> None:
    """As torchao's CPUOffloadOptimizer copies them to the host."""
    model = Network()
    copies: dict[Tensor, Tensor] = {}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: copies.update({p: p.grad.clone()}))  # pyright: ignore
    model.loss().backward()
    raw = dict(copies)
    model.zero_grad()
    with sdsopt.attach(model):
        model.loss().backward()
    assert not torch.allclose(copies[model.first.A], raw[model.first.A])
    assert torch.equal(copies[model.first.A], model.first.A.grad)  # pyright: ignore
