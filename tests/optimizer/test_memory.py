"""The peak of a step, as torch's allocator sees it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable

import pytest
import torch

from sdsopt import SDSPreconditioner, attach
from sdsopt.bench.adapter import Adapter
from sdsopt.bench.memory import peak_extra_bytes
from sdsopt.bench.shapes import LayerShape, ModelShape
from sdsopt.linalg import available_inverse_roots

# Large enough that what is computed with at a time does not count: 80 MiB of LoRA parameters.
SHAPE = ModelShape("", (LayerShape(12288, 4096), LayerShape(4096, 12288)), 20)
RANK = 32
AT_A_TIME = 12 * 2**20
BOUND = 20 * 2**20  # ten pairs


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
    peak = peak_extra_bytes(optimizer.step)
    # The corrected gradients must be somewhere, since the raw ones come back.
    assert (copies - 0.01) * adapter.num_bytes < peak < copies * adapter.num_bytes + AT_A_TIME
    # A CPU's are kept for the next step, which takes what it computes with alone.
    assert peak_extra_bytes(optimizer.step) < AT_A_TIME


@pytest.mark.parametrize(("correction", "copies"), [("sds", 1), ("sds-split", 2)])
def test_what_stays_between_steps(correction: str, copies: int) -> None:
    """With weight decay, for which more is computed. It is enough for the next step."""
    small = Adapter(ModelShape("", (LayerShape(3000, 2000), LayerShape(2000, 3000)), 60), 60, 4, torch.float32, "cpu")
    small.backward()
    optimizer = SDSPreconditioner(torch.optim.AdamW(small.parameters(), lr=1e-3, fused=True), small, correction)
    optimizer.step()
    for _ in range(2):
        assert peak_extra_bytes(optimizer.step) < 0.2 * small.num_bytes
        kept = optimizer._engine._buffers._kept  # pyright: ignore
        stays = sum(tensor.nbytes for tensors in kept.values() for tensor in tensors)
        assert copies * small.num_bytes <= stays < (copies + 0.2) * small.num_bytes


def test_a_copy_keeps_memory_of_its_own() -> None:
    """A wrapper that was copied after a step holds none of that memory, and steps by itself."""
    small = Adapter(ModelShape("", (LayerShape(300, 200),), 2), 2, 4, torch.float32, "cpu")
    small.backward()
    optimizer = SDSPreconditioner(torch.optim.SGD(small.parameters(), lr=1e-2), small, "sds-split")
    fresh = len(pickle.dumps(optimizer))
    optimizer.step()
    assert len(pickle.dumps(optimizer)) < fresh + small.num_bytes / 4
    before = [parameter.detach().clone() for parameter in small.parameters()]
    copy.deepcopy(optimizer).step()
    assert all(torch.equal(one, other) for one, other in zip(before, small.parameters(), strict=True))


class Secant(torch.optim.SGD):
    """Keeps the gradient of a step for the next one, as it is or as a view."""

    def __init__(self, params: Iterable[torch.Tensor], keep: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(params, lr=1e-3)
        self.differences: list[float] = []
        self._keep = keep

    def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if "last" in state:
                self.differences.append((parameter.grad.flatten() - state["last"].flatten()).abs().max().item())
            state["last"] = self._keep(parameter.grad)
        super().step()


@pytest.mark.parametrize("keep", [lambda g: g, lambda g: g.detach(), lambda g: g.view(-1)], ids=["it", "alias", "view"])
@pytest.mark.parametrize("correction", ["lora", "sds"])
def test_a_gradient_that_is_kept_is_not_written_over(
    correction: str, keep: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    found: list[list[float]] = []
    for kept in (keep, torch.clone):
        torch.manual_seed(0)
        adapter = Adapter(ModelShape("", (LayerShape(3000, 2000),), 1), 1, 4, torch.float32, "cpu")
        optimizer = Secant(adapter.parameters(), kept)
        wrapper = SDSPreconditioner(optimizer, adapter, correction)
        for scale in (1.0, 2.0, 5.0):
            for parameter in adapter.parameters():
                parameter.grad = scale * torch.randn_like(parameter)
            wrapper.step()
        found.append(optimizer.differences)
    assert found[0] == found[1]
    assert min(found[0]) > 0.1


@pytest.mark.parametrize("end", ["shared", "freed"])
def test_memory_that_was_shared_or_freed_is_not_written_over(end: str) -> None:
    """By a hook that sends gradients to another process, or by an optimizer that saves memory."""
    adapter = Adapter(ModelShape("", (LayerShape(3000, 2000),), 1), 1, 4, torch.float32, "cpu")
    adapter.backward()
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    optimizer = SDSPreconditioner(inner, adapter)
    [first, *_] = adapter.parameters()
    seen: list[tuple[int, float]] = []

    def after(*_: object) -> None:
        assert first.grad is not None
        storage = first.grad.untyped_storage()
        seen.append((storage.data_ptr(), first.grad.norm().item()))
        if end == "shared":
            storage.share_memory_()
        else:
            storage.resize_(0)

    inner.register_step_post_hook(after)
    for _ in range(3):
        optimizer.step()
    assert len(seen) == 3
    assert all(norm > 0 for _, norm in seen)


def test_steps_inside_and_outside_of_inference_mode() -> None:
    adapter = Adapter(ModelShape("", (LayerShape(30, 20),), 1), 1, 4, torch.float32, "cpu")
    adapter.backward()
    optimizer = SDSPreconditioner(torch.optim.SGD(adapter.parameters(), lr=1e-2), adapter, "sds-split")
    with torch.inference_mode():
        optimizer.step()
    before = [parameter.detach().clone() for parameter in adapter.parameters()]
    optimizer.step()
    assert not any(torch.equal(one, other) for one, other in zip(before, adapter.parameters(), strict=True))


def test_memory_of_replaced_parameters_is_let_go() -> None:
    adapter = Adapter(ModelShape("", (LayerShape(30, 20),), 1), 1, 4, torch.float32, "cpu")
    adapter.backward()
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    optimizer = SDSPreconditioner(inner, adapter, "sds-split")
    optimizer.step()
    old = weakref.ref(adapter.layers[0].lora_A["default"].weight)
    adapter.load_state_dict({k: v.clone() for k, v in adapter.state_dict().items()}, assign=True)
    inner.param_groups[0]["params"] = list(adapter.parameters())
    inner.state.clear()
    adapter.backward()
    optimizer.step()
    gc.collect()
    assert old() is None


def test_clipping_copies_no_corrected_gradient(adapter: Adapter) -> None:
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-6)
    optimizer = SDSPreconditioner(inner, adapter, max_grad_norm=1.0)
    assert peak_extra_bytes(optimizer.step) < adapter.num_bytes + AT_A_TIME


@pytest.mark.parametrize(("correction", "copies"), [("sds", 1), ("sds-split", 2), ("lora-pro", 1)])
def test_the_bound_holds(adapter: Adapter, correction: str, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stacks and parts as large as on a GPU."""
    for name in ("sdsopt.engine.stacks", "sdsopt.linalg.products"):
        monkeypatch.setattr(f"{name}._CPU_BYTES", 2**27)
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-6)
    peaks: list[int] = []
    for bound in (None, BOUND):
        optimizer = SDSPreconditioner(inner, adapter, correction, max_workspace_bytes=bound)
        peaks.append(peak_extra_bytes(optimizer.step) - copies * adapter.num_bytes)
    free, bounded = peaks
    assert bounded < BOUND < free


def test_the_bound_holds_in_backward(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sdsopt.engine.stacks", "sdsopt.linalg.products"):
        monkeypatch.setattr(f"{name}._CPU_BYTES", 2**27)
    factor = adapter.layers[0].lora_A["default"].weight
    bound = 2**20
    peaks: list[int] = []
    for max_bytes in (None, bound):
        adapter.zero_grad()
        with attach(adapter, max_workspace_bytes=max_bytes):
            # The first hook computes the roots of all pairs. The gradient is there twice, raw and corrected.
            peaks.append(peak_extra_bytes(factor.sum().backward) - 2 * factor.nbytes)
    free, bounded = peaks
    assert bounded < bound < free


@pytest.mark.parametrize("method", available_inverse_roots())
def test_the_bound_holds_for_roots(method: str) -> None:
    """With r×r matrices as large as factors. Those of all pairs stay; what they are made with does not."""
    adapter = Adapter(ModelShape("", (LayerShape(64, 64),), 64), 64, 64, torch.float32, "cpu")
    adapter.backward()
    kept = adapter.num_bytes + 2 * 2 * adapter.num_pairs * 64 * 64 * 8
    inner = torch.optim.SGD(adapter.parameters(), lr=1e-6)
    bound = 2 * 2**20
    peaks: list[int] = []
    for max_bytes in (None, bound):
        optimizer = SDSPreconditioner(inner, adapter, inverse_root=method, max_workspace_bytes=max_bytes)
        peaks.append(peak_extra_bytes(optimizer.step) - kept)
    free, bounded = peaks
    assert bounded < bound < free


@pytest.mark.parametrize("correction", ["sds", "sds-split", "lora-pro"])
def test_a_bound_changes_no_step(correction: str) -> None:
    """Not even one of a single byte: a pair is the least to compute with."""
    steps: list[list[torch.Tensor]] = []
    for bound in (None, 1):
        torch.manual_seed(0)
        adapter = Adapter(ModelShape("", (LayerShape(30, 20), LayerShape(20, 30, 2)), 2), 2, 4, torch.float64, "cpu")
        adapter.backward()
        inner = torch.optim.SGD(adapter.parameters(), lr=1e-2)
        SDSPreconditioner(inner, adapter, correction, max_workspace_bytes=bound).step()
        steps.append(list(adapter.parameters()))
    for one, other in zip(*steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_bound_changes_no_gradient_in_backward() -> None:
    adapter = Adapter(ModelShape("", (LayerShape(30, 20), LayerShape(20, 30, 2)), 2), 2, 4, torch.float64, "cpu")
    gradients: list[list[torch.Tensor]] = []
    for bound in (None, 1):
        with attach(adapter, max_workspace_bytes=bound):
            adapter.backward()
        gradients.append([p.grad for p in adapter.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(adapter.parameters()))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_is_positive(adapter: Adapter, bound: int) -> None:
    with pytest.raises(ValueError, match="max_workspace_bytes must be a positive integer"):
        SDSPreconditioner(torch.optim.SGD(adapter.parameters()), adapter, max_workspace_bytes=bound)
    with pytest.raises(ValueError, match="max_workspace_bytes must be a positive integer"):
        attach(adapter, max_workspace_bytes=bound)
