"""The peak of a step, as torch's allocator sees it."""

from __future__ import annotations

import pytest
import torch

from sdsopt import SDSPreconditioner
from sdsopt.bench.adapter import Adapter
from sdsopt.bench.memory import peak_extra_bytes
from sdsopt.bench.shapes import LayerShape, ModelShape

# Large enough that what is computed with at a time does not count: 80 MiB of LoRA parameters.
SHAPE = ModelShape("", (LayerShape(12288, 4096), LayerShape(4096, 12288)), 20)
RANK = 32
AT_A_TIME = 12 * 2**20


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    adapter = Adapter(SHAPE, SHAPE.blocks, RANK, torch.float32, "cpu")
    adapter.backward()
    return adapter


@pytest.mark.parametrize(("correction", "copies"), [("lora", 1), ("sds", 1), ("scaled", 1), ("sds-split", 2)])
def test_peak_extra_memory(adapter: Adapter, correction: str, copies: int) -> None:
    assert adapter.num_bytes == 80 * 2**20
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-6)
    optimizer = SDSPreconditioner(inner, adapter, correction)
    optimizer.step()
    peak = peak_extra_bytes(optimizer.step)
    # The corrected gradients must be somewhere, since the raw ones come back.
    assert (copies - 0.01) * adapter.num_bytes < peak < copies * adapter.num_bytes + AT_A_TIME


def test_clipping_copies_no_corrected_gradient(adapter: Adapter) -> None:
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-6)
    optimizer = SDSPreconditioner(inner, adapter, max_grad_norm=1.0)
    optimizer.step()
    assert peak_extra_bytes(optimizer.step) < adapter.num_bytes + AT_A_TIME
