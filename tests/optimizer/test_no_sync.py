"""The step asks the device nothing, so that it can be captured into a CUDA graph and never holds up the queue.

Shown without a GPU: fake tensors have a device, shapes and dtypes, and no values. Whatever would read one raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from sdsopt import SDSPreconditioner, attach, available_corrections
from sdsopt.corrections import make_correction
from toy import LoRALinear, Network

# These wait for the device inside, to see whether they failed.
DECOMPOSITIONS = {"_linalg_eigh", "_linalg_svd", "linalg_eig"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"}
GRAM_POWERS = ("lora", "sds", "sds-split", "scaled")


class Operations(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=True)


def capturable_adamw(parameters: Any) -> Optimizer:
    inner = AdamW(parameters, lr=0.1, capturable=True)
    inner.param_groups[0]["lr"] = torch.empty((), device="cuda")  # its constructor reads the value to check it
    return inner


def step_elsewhere(
    correction: str, inner: Callable[[Any], Optimizer], device: str, pairs: int = 6, **options: Any
) -> Counter[str]:
    """The operations of one step on pairs of two shapes, in bfloat16 where the correction takes it."""
    dtype = torch.float32 if make_correction(correction).keeps_memory else torch.bfloat16
    shapes = [(4, 16, 24), (4, 16, 8)] * (pairs // 2)
    new = [[torch.empty(s, device=device, dtype=dtype) for s in ((r, n), (m, r))] for r, n, m in shapes]
    model = nn.ModuleList(LoRALinear(A, B) for A, B in new)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = SDSPreconditioner(inner(model.parameters()), model, correction, **options)
    with Operations() as operations:
        optimizer.step()
    return operations.counts


def test_a_value_that_is_read_raises() -> None:
    """Else the tests below would show nothing."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty((), device="cuda").item()


@pytest.mark.parametrize("options", [{}, {"rescale": "grad_norm"}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("correction", available_corrections())
def test_nothing_is_read(correction: str, options: dict[str, Any]) -> None:
    counts = step_elsewhere(correction, sgd, "meta", **options)
    assert not READS & counts.keys()
    assert correction == "lora" or counts["bmm"] > 0


@pytest.mark.parametrize("inner", [sgd, capturable_adamw])
@pytest.mark.parametrize("correction", GRAM_POWERS)
def test_nothing_waits_for_a_gpu(correction: str, inner: Callable[[Any], Optimizer]) -> None:
    with FakeTensorMode():
        counts = step_elsewhere(correction, inner, "cuda")
    assert not (READS | DECOMPOSITIONS) & counts.keys()
    assert counts["_foreach_add_"] + counts["addcdiv_"] > 0  # the inner optimizer stepped


@pytest.mark.parametrize("correction", GRAM_POWERS)
def test_more_pairs_are_no_more_products(correction: str) -> None:
    """Pairs of one shape are stacked: a GPU waits for calls, not for what they do."""
    few, many = (step_elsewhere(correction, sgd, "meta", pairs) for pairs in (6, 60))
    assert few["bmm"] == many["bmm"]
    assert few["cat"] == many["cat"]


def test_backward_hooks_read_nothing() -> None:
    model = Network()
    with attach(model), Operations() as operations:
        model.loss().backward()
    assert operations.counts["bmm"] > 0
    assert not READS & operations.counts.keys()
