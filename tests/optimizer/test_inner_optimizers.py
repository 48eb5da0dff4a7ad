"""Every inner optimizer: bare and wrapped, checkpoints both ways, resume, weight decay."""

from __future__ import annotations

import copy
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch_optimizer
from torch.nn import Parameter
from torch.optim import Optimizer

from inner_optimizers import ALL, REFUSED, TORCH, TORCH_OPTIMIZER, Inner
from sdsopt import GramPower, SDSPreconditioner, available_corrections
from sdsopt.corrections import make_correction
from sdsopt.errors import UnsupportedOptimizerError
from sdsopt.weight_decay import decoupled_decay
from toy import Network, assert_same, train

pytestmark = [
    # torch_optimizer still calls deprecated overloads.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
every = pytest.mark.parametrize("inner", ALL, ids=lambda inner: inner.name)
every_that_loads = pytest.mark.parametrize("inner", [row for row in ALL if row.loads], ids=lambda inner: inner.name)


def matrices(model: Network) -> Iterator[Parameter]:
    """Muon takes nothing else."""
    return (parameter for parameter in model.parameters() if parameter.ndim == 2)


def saved(optimizer: Optimizer) -> dict[str, Any]:
    """The state dict, after a trip to disk and back."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def optimizers_of(module: Any) -> set[str]:
    classes = (getattr(module, name) for name in dir(module))
    return {c.__name__ for c in classes if inspect.isclass(c) and issubclass(c, Optimizer)} - {"Optimizer"}


@pytest.mark.parametrize(
    ("module", "rows", "refused"),
    [(torch.optim, TORCH, REFUSED["torch"]), (torch_optimizer, TORCH_OPTIMIZER, REFUSED["torch_optimizer"])],
    ids=["torch", "torch_optimizer"],
)
def test_the_table_is_complete(module: Any, rows: list[Inner], refused: set[str]) -> None:
    tabled = {row.name.removeprefix("torch_optimizer.").partition("-")[0] for row in rows}
    assert optimizers_of(module) == tabled | refused
    assert len({row.name for row in rows}) == len(rows)


def test_adahessian_is_refused() -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match="Adahessian differentiates the gradients a second time"):
        SDSPreconditioner(torch_optimizer.Adahessian(model.parameters()), model)


@every
def test_lora_is_the_bare_optimizer_bit_for_bit(inner: Inner) -> None:
    bare_model, model = Network(), Network()
    bare, optimizer = inner(matrices(bare_model), 0.1), inner(matrices(model), 0.1)
    train(bare_model, bare, 4)
    train(model, SDSPreconditioner(optimizer, model, "lora"), 4)
    assert_same(bare_model, model)


@every
@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_the_correction_acts(inner: Inner, correction: str) -> None:
    bare_model, model = Network(), Network()
    train(bare_model, inner(matrices(bare_model)), 8)
    train(model, SDSPreconditioner(inner(matrices(model)), model, correction), 8)
    for (name, a), b in zip(model.named_parameters(), bare_model.parameters(), strict=True):
        assert a.isfinite().all(), name
        if "lora" in name:
            assert not torch.equal(a, b), name


@every_that_loads
@pytest.mark.parametrize("way", ["bare to wrapped", "wrapped to bare"])
def test_checkpoints_move_both_ways(inner: Inner, way: str) -> None:
    """Train bare, go on wrapped, or the other way round: where nothing is corrected, nothing changes."""
    reference = Network()
    reference_optimizer = inner(matrices(reference))
    train(reference, reference_optimizer, 3)
    middle = copy.deepcopy(reference)
    state = saved(reference_optimizer)
    if way == "wrapped to bare":
        wrapped = SDSPreconditioner(inner(matrices(middle)), middle, "lora")
        wrapped.load_state_dict(state)
        state = saved(wrapped)
    bare_next, wrapped_next = copy.deepcopy(middle), copy.deepcopy(middle)
    optimizers = inner(matrices(bare_next)), SDSPreconditioner(inner(matrices(wrapped_next)), wrapped_next, "lora")
    for net, optimizer in zip((bare_next, wrapped_next), optimizers, strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
        train(net, optimizer, 3, first=3)
    assert_same(bare_next, wrapped_next)


def has_rate(inner: Inner) -> bool:
    return all(group.get("lr") is not None for group in inner(matrices(Network())).param_groups)


@every_that_loads
@pytest.mark.parametrize("correction", available_corrections())
def test_resume_equals_uninterrupted(inner: Inner, correction: str) -> None:
    """Bit for bit."""
    model = Network()
    if make_correction(correction).uses_learning_rates and not has_rate(inner):
        with pytest.raises(UnsupportedOptimizerError, match=r"takes the length of its steps .* has no \"lr\""):
            SDSPreconditioner(inner(matrices(model)), model, correction)
        return
    optimizer = SDSPreconditioner(inner(matrices(model)), model, correction)
    train(model, optimizer, 3)
    resumed = Network()
    resumed.load_state_dict(model.state_dict())
    state = saved(optimizer)
    train(model, optimizer, 3, first=3)

    again = SDSPreconditioner(inner(matrices(resumed)), resumed, correction)
    again.load_state_dict(state)
    train(resumed, again, 3, first=3)
    assert_same(model, resumed)


def test_what_does_not_load_wrapped_does_not_load_bare() -> None:
    rows = [row for row in ALL if not row.loads]
    assert [row.name for row in rows] == ["torch_optimizer.Lookahead"]
    for row in rows:
        model = Network()
        optimizer = row(matrices(model))
        train(model, optimizer, 1)
        with pytest.raises((KeyError, ValueError, AttributeError, RuntimeError, TypeError)):
            row(matrices(Network())).load_state_dict(optimizer.state_dict())


def first_step(inner: Inner, weight_decay: float, scale: float) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Values before and after one step of the bare optimizer, and the share that we think it took."""
    parameter = Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    optimizer = inner([parameter], weight_decay)
    before = parameter.detach().clone()
    parameter.grad = scale * torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    optimizer.step()
    return before, parameter.detach(), decoupled_decay(optimizer, optimizer.param_groups[0], parameter)


@every
def test_the_share_of_decoupled_decay(inner: Inner) -> None:
    """A step with decay, less the same step without, is -share·p whatever the gradient: that is decoupled."""
    before, with_decay, share = first_step(inner, 0.1, 1.0)
    _, without, _ = first_step(inner, 0.0, 1.0)
    if inner.decay == "decoupled":
        # Some compute in float32 whatever the parameter's dtype.
        torch.testing.assert_close(with_decay - without, -share * before, rtol=0, atol=1e-6)
        assert share > 0
        return
    if inner.decay == "unknowable":  # refused where it would matter, see below
        return
    assert share == 0
    if inner.decay == "none":
        return
    ratio = (with_decay - without) / before
    looks_decoupled = bool((ratio.max() - ratio.min()).abs() < 1e-6 * ratio.abs().max()) and bool(ratio.any())
    assert looks_decoupled == (inner.decay == "linear")


@pytest.mark.parametrize("inner", [row for row in ALL if row.decay == "decoupled"], ids=lambda inner: inner.name)
def test_the_split_form_does_not_precondition_decoupled_decay(inner: Inner) -> None:
    """With decay, a step lands where it does without, less the bare optimizer's decay."""
    ends: list[Network] = []
    start = Network(dtype=torch.float64)
    for weight_decay in (0.1, 0.0):
        model = Network(dtype=torch.float64)
        optimizer = inner(matrices(model), weight_decay)
        # Without the limit on the update's length, which stays the same in both.
        train(model, SDSPreconditioner(optimizer, model, GramPower(0.5, 0.5, max_update_ratio=None)), 1)
        ends.append(model)
        if weight_decay:
            group = optimizer.param_groups[0]
            shares = [decoupled_decay(optimizer, group, p) for p in matrices(model)]
    for p, q, before, share in zip(*(matrices(m) for m in (*ends, start)), shares, strict=True):  # pyright: ignore
        assert share > 0
        torch.testing.assert_close(p, q - share * before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", [row for row in ALL if row.decay == "unknowable"], ids=lambda inner: inner.name)
def test_the_split_form_refuses_decay_that_it_cannot_tell(inner: Inner) -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match="set weight_decay=0"):
        SDSPreconditioner(inner(matrices(model), 0.1), model, "sds-split")
    SDSPreconditioner(inner(matrices(model), 0.1), model, "sds")
    optimizer = SDSPreconditioner(inner(model.first.parameters(), 0.0), model, "sds-split")
    with pytest.raises(UnsupportedOptimizerError, match="set weight_decay=0"):
        optimizer.add_param_group({"params": list(model.second.parameters()), "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1


def test_no_row_warns_where_it_matters() -> None:
    """The filters above are for torch_optimizer: torch's own optimizers raise no warning inside the wrapper."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inner in TORCH:
            model = Network()
            train(model, SDSPreconditioner(inner(matrices(model)), model), 2)
