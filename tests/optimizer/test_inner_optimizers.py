"""Every inner optimizer: bare and wrapped, checkpoints both ways, resume, what the split form needs to know of it."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

import toy
from inner_optimizers import ALL, PACKAGES, TABLES, Inner
from recorder import train_by_hand
from sdsopt import GramPower, SDSPreconditioner, available_corrections
from sdsopt.corrections import make_correction
from sdsopt.errors import UnsupportedOptimizerError
from sdsopt.inner import require_mappable
from sdsopt.weight_decay import decoupled_decay
from toy import Network, assert_same

pytestmark = [
    # They call deprecated overloads, and bitsandbytes says that nothing is paged on the CPU.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
# What corrections that carry moments from basis to basis can be put around.
KNOWN_MOMENTS = {f"torch.{name}" for name in ("Adam", "AdamW", "Muon", "NAdam", "RAdam", "SGD")}


def parametrized(rows: list[Inner]) -> Any:
    return pytest.mark.parametrize("inner", rows, ids=lambda inner: inner.name)


every = parametrized(ALL)
every_that_loads = parametrized([inner for inner in ALL if inner.loads])
every_with_decay = parametrized([inner for inner in ALL if inner.decays and not inner.pulls])


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao and bitsandbytes compile their steps, for seconds each; what is tested is the same without."""
    with torch.compiler.set_stance("force_eager"):
        yield


def network(inner: Inner, dtype: torch.dtype = torch.float32) -> Network:
    return Network(dtype=dtype, width=inner.width)


def matrices(model: Network) -> Iterator[Parameter]:
    """Muon takes nothing else."""
    return (parameter for parameter in model.parameters() if parameter.ndim == 2)


def bare(inner: Inner, model: Network, weight_decay: float = 0.0) -> Optimizer:
    return inner(matrices(model), weight_decay)


def wrapped(inner: Inner, model: Network, correction: str, weight_decay: float = 0.0) -> SDSPreconditioner:
    return SDSPreconditioner(bare(inner, model, weight_decay), model, correction)


def seed(number: int) -> None:
    """For what optimizers draw at random."""
    torch.manual_seed(number)
    np.random.seed(number)


def train(model: Network, optimizer: Optimizer, steps: int, first: int = 0) -> None:
    seed(first)
    toy.train(model, optimizer, steps, first)


def saved(inner: Inner, optimizer: Optimizer) -> dict[str, Any]:
    """The state dict, after a trip to disk and back."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=inner.weights_only)


def assert_factors_differ(one: Network, other: Network) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert a.isfinite().all(), name
        if "lora" in name:
            assert not torch.equal(a, b), name


@pytest.mark.parametrize("package", PACKAGES)
def test_the_table_is_complete(package: str) -> None:
    if package not in TABLES:
        pytest.skip(f"{package} is not installed")
    table = TABLES[package]
    tabled = {inner.name.partition("-")[0] for inner in table.rows}
    assert tabled
    assert table.classes == tabled | set(table.refused) | set(table.left_out)
    assert not tabled & (set(table.refused) | set(table.left_out))
    assert len({inner.name for inner in table.rows}) == len(table.rows)


def documented(section: str) -> str:
    """One section of the page on inner optimizers."""
    page = (Path(__file__).parents[2] / "docs" / "inner-optimizers.md").read_text(encoding="utf8")
    return page.partition(f"# {section}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("package", TABLES)
def test_the_documentation_has_the_same_table(package: str) -> None:
    table = TABLES[package]
    [names] = re.findall(rf"^\| `{package}` \| (.*) \|$", documented("Inner optimizers"), flags=re.MULTILINE)
    tabled = {inner.name.partition("-")[0] for inner in table.rows}
    apart = {name for name, reason in table.left_out.items() if "tested apart" in reason}
    assert set(names.split(", ")) == tabled | apart

    refused, limited = (set(re.findall(r"\w+", documented(section))) for section in ("Refused", "Limited"))
    assert set(table.refused) <= refused
    assert {name for name in table.left_out if name not in apart} - {"BaseOptimizer"} <= limited
    special = [i for i in table.rows if i.unknowable or not i.loads or not i.weights_only]
    assert {inner.name.partition("-")[0] for inner in special} <= limited


@every
def test_lora_is_the_bare_optimizer_bit_for_bit(inner: Inner) -> None:
    one, other = network(inner), network(inner)
    train(one, bare(inner, one, 0.1), 4)
    train(other, wrapped(inner, other, "lora", 0.1), 4)
    assert_same(one, other)


@every
def test_a_corrected_step_is_the_bare_step_on_corrected_gradients(inner: Inner) -> None:
    plain, by_hand, model = network(inner), network(inner), network(inner)
    seed(0)
    train_by_hand(by_hand, bare(inner, by_hand), 8)
    train(model, wrapped(inner, model, "sds"), 8)
    train(plain, bare(inner, plain), 8)
    assert_same(by_hand, model)
    assert_factors_differ(model, plain)


@parametrized([inner for inner in ALL if not inner.pulls])
def test_the_mapped_step_is_another(inner: Inner) -> None:
    plain, model = network(inner), network(inner)
    train(plain, wrapped(inner, plain, "sds"), 8)
    train(model, wrapped(inner, model, "sds-split"), 8)
    assert_factors_differ(model, plain)


@every_that_loads
@pytest.mark.parametrize("way", ["bare to wrapped", "wrapped to bare"])
def test_checkpoints_move_both_ways(inner: Inner, way: str) -> None:
    """Train one, go on with either: where nothing is corrected, they go on alike."""
    start = network(inner)
    optimizer = bare(inner, start) if way == "bare to wrapped" else wrapped(inner, start, "sds")
    train(start, optimizer, 3)
    ends = copy.deepcopy(start), copy.deepcopy(start)
    for model, other in zip(ends, (bare(inner, ends[0]), wrapped(inner, ends[1], "lora")), strict=True):
        other.load_state_dict(saved(inner, optimizer))
        train(model, other, 3, first=3)
    assert_same(*ends)


@pytest.mark.parametrize(
    ("inner", "correction"),
    [
        (inner, correction)
        for inner in ALL
        for correction in available_corrections()
        if inner.loads and not (inner.pulls and make_correction(correction).uses_updates)
        if inner.name.partition("-")[0] in KNOWN_MOMENTS or not make_correction(correction).carries_moments
        # What a row means to one correction of gradients it means to all.
        if inner.name.startswith("torch.") or correction == ("sds" if inner.pulls else "sds-split")
    ],
    ids=lambda value: value.name if isinstance(value, Inner) else value,
)
def test_resume_equals_uninterrupted(inner: Inner, correction: str) -> None:
    """Bit for bit."""
    model, resumed = network(inner), network(inner)
    optimizer = wrapped(inner, model, correction)
    train(model, optimizer, 3)
    resumed.load_state_dict(model.state_dict())
    state = saved(inner, optimizer)
    train(model, optimizer, 3, first=3)

    again = wrapped(inner, resumed, correction)
    again.load_state_dict(state)
    train(resumed, again, 3, first=3)
    assert_same(model, resumed)


def test_what_does_not_load_wrapped_does_not_load_bare() -> None:
    rows = [inner for inner in ALL if not inner.loads]
    assert {inner.name for inner in rows} <= {"torch_optimizer.Lookahead"}
    for inner in rows:
        model = network(inner)
        optimizer = bare(inner, model)
        train(model, optimizer, 1)
        with pytest.raises((KeyError, ValueError, AttributeError, RuntimeError, TypeError)):
            bare(inner, network(inner)).load_state_dict(optimizer.state_dict())


def mappable(inner: Inner, setting: dict[str, Any]) -> bool:
    optimizer = bare(inner, network(inner), 0.1)
    try:
        groups = [{**group, **setting} for group in optimizer.param_groups]
        require_mappable(optimizer, make_correction("sds-split"), groups)
    except UnsupportedOptimizerError:
        return False
    return True


class Step(NamedTuple):
    """One step of the bare optimizer from the same point: with decay, without it, and what we know of it."""

    before: Tensor
    with_decay: Tensor
    without: Tensor
    share: float

    @property
    def is_decoupled(self) -> bool:
        """Whether the decay takes the same share of every weight, before the update or after it."""
        taken = self.without - self.with_decay
        tolerance = 1e-6 if taken.dtype == torch.float64 else 1e-3
        for point in (self.before, self.without):
            share = (taken * point).sum() / (point * point).sum()
            if taken.any() and (taken - share * point).norm() < tolerance * taken.norm():
                return True
        return False


def one_step(inner: Inner, after: int, setting: dict[str, Any]) -> Step:
    ends: list[Tensor] = []
    before, share = torch.empty(0), 0.0
    for weight_decay in (0.1, 0.0):
        shape = (5, 4) if inner.width == Inner.width else (64, 64)
        generator = torch.Generator().manual_seed(0)
        parameter = Parameter(torch.randn(shape, generator=generator, dtype=inner.dtype))
        optimizer = inner([parameter], 0.1 if after else weight_decay)
        optimizer.param_groups[0].update(setting)
        for step in range(after + 1):
            if step == after:  # the state is the same in both, and so the difference is this step's
                optimizer.param_groups[0]["weight_decay"] = weight_decay
                before = parameter.detach().clone()
            seed(step)
            parameter.grad = torch.randn(shape, generator=generator, dtype=inner.dtype)
            optimizer.step()
        ends.append(parameter.detach())
        share = share or float(decoupled_decay(optimizer, optimizer.param_groups[0], parameter))
    return Step(before, *ends, share)


def settings(inner: Inner) -> list[dict[str, Any]]:
    """As it is built, and with those switches of its param group that bear on decay."""
    group = bare(inner, network(inner)).param_groups[0]
    flags = [flag for flag in ("weight_decouple", "decoupled_weight_decay") if flag in group]
    found: list[dict[str, Any]] = [{}, *({flag: value} for flag in flags for value in (True, False))]
    if group.get("foreach", True) is None and not isinstance(group.get("lr"), Tensor):
        found.append({"foreach": True})
    return found + [{"fixed_decay": True}] * ("fixed_decay" in group)


@every_with_decay
def test_the_share_of_decoupled_decay(inner: Inner) -> None:
    """Where it is positive the bare step takes just that; where it is zero, the decay is part of the update."""
    assert mappable(inner, {}) != inner.unknowable
    for setting in settings(inner):
        if not mappable(inner, setting):
            continue
        looks: list[bool] = []
        for after in (0, 3):
            step = one_step(inner, after, setting)
            assert setting or (step.share > 0) == inner.decoupled
            if step.share == 0:
                looks.append(step.is_decoupled)
                continue
            tolerance = 1e-6 if inner.dtype == torch.float64 else 1e-3
            taken = (step.without - step.with_decay) / step.share
            errors = [float((taken - point).norm() / point.norm()) for point in (step.before, step.without)]
            assert min(errors) < tolerance, (setting, after)
        assert not any(looks) or inner.linear, setting
        assert setting or not looks or any(looks) or not inner.linear


@parametrized([inner for inner in ALL if inner.decoupled and not inner.pulls])
def test_the_split_form_does_not_map_decoupled_decay(inner: Inner) -> None:
    """With decay, a step lands where it does without, less the bare optimizer's decay."""
    start = network(inner, inner.dtype)
    ends: list[Network] = []
    shares: list[float] = []
    for weight_decay in (0.1, 0.0):
        model = network(inner, inner.dtype)
        optimizer = bare(inner, model, weight_decay)
        # Without the limit on the update's length, which stays the same in both.
        train(model, SDSPreconditioner(optimizer, model, GramPower(0.5, 0.5, max_update_ratio=None)), 1)
        ends.append(model)
        shares = shares or [float(decoupled_decay(optimizer, optimizer.param_groups[0], p)) for p in matrices(model)]
    for p, q, before, share in zip(*(matrices(m) for m in (*ends, start)), shares, strict=True):  # pyright: ignore
        assert share > 0
        assert any(torch.allclose(p, q - share * point, rtol=0, atol=1e-6) for point in (before, q))


@parametrized([inner for inner in ALL if inner.unknowable])
def test_the_split_form_refuses_decay_that_it_cannot_tell(inner: Inner) -> None:
    model = network(inner)
    with pytest.raises(UnsupportedOptimizerError, match="set weight_decay=0"):
        wrapped(inner, model, "sds-split", 0.1)
    wrapped(inner, model, "sds", 0.1)


def pull(inner: Inner) -> float:
    """How far a displacement of the weights bears on steps without gradient: not at all, where there is no pull."""
    moves: list[Tensor] = []
    for displacement in (0.0, 1.0):
        parameter = Parameter(torch.arange(1.0, 21.0, dtype=inner.dtype).reshape(5, 4))
        optimizer = inner([parameter])
        seed(0)
        for step in range(13):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            if step == 0:
                with torch.no_grad():
                    parameter.add_(torch.tensor([1.0, -2.0, 3.0, -4.0]), alpha=displacement)
                before = parameter.detach().clone()
        moves.append(parameter.detach() - before)
    return float((moves[1] - moves[0]).abs().max())


@every
def test_the_split_form_refuses_steps_that_pull(inner: Inner) -> None:
    optimizer = bare(inner, network(inner))
    averages = hasattr(optimizer, "eval")
    assert (averages or pull(inner) > 1e-5) == inner.pulls
    if inner.pulls:
        model = network(inner)
        with pytest.raises(UnsupportedOptimizerError, match="also draws the weights towards values of its own"):
            wrapped(inner, model, "sds-split")


def test_a_group_that_cannot_be_mapped_is_not_added() -> None:
    model = Network()
    inner = next(inner for inner in ALL if inner.unknowable)
    optimizer = SDSPreconditioner(inner(model.first.parameters(), 0.0), model, "sds-split")
    with pytest.raises(UnsupportedOptimizerError, match="set weight_decay=0"):
        optimizer.add_param_group({"params": list(model.second.parameters()), "weight_decay": 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in TABLES for name in TABLES[package].refused]
)
def test_what_takes_more_than_a_gradient_is_refused(package: str, name: str) -> None:
    model = Network()
    optimizer = TABLES[package].refused[name](model)
    with pytest.raises(UnsupportedOptimizerError, match=name):
        SDSPreconditioner(optimizer, model)


def test_one_that_takes_the_model_and_not_its_parameters() -> None:
    """AdamMini makes a group of each parameter, named, and with this has its own way for biases."""
    package = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    plain, model, by_hand = Network(), Network(), Network()
    train(plain, package.AdamMini(plain, lr=0.01), 4)
    train(model, SDSPreconditioner(package.AdamMini(model, lr=0.01), model), 4)
    train_by_hand(by_hand, package.AdamMini(by_hand, lr=0.01), 4)
    assert_same(model, by_hand)
    assert_factors_differ(model, plain)


def test_what_is_left_out_does_not_work_bare_either() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.optim", exc_type=ImportError)
    package = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    for name in ("AdEMAMix32bit", "PagedAdEMAMix32bit"):
        model = Network()
        with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
            train(model, getattr(bitsandbytes, name)(model.parameters(), lr=0.01), 1)
    start, model = Network(), Network()
    train(model, package.TRAC(torch.optim.AdamW(model.parameters(), lr=0.01)), 8)
    torch.testing.assert_close(model.state_dict(), start.state_dict())


DISTRIBUTED: dict[str, dict[str, Any]] = {"DistributedMuon": {"use_muon": True}, "DeMo": {}}


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_those_that_need_a_process_group(name: str, tmp_path: Path) -> None:
    package = pytest.importorskip("pytorch_optimizer", exc_type=ImportError)

    def make(model: Network) -> Optimizer:
        return getattr(package, name)([{"params": list(matrices(model)), **DISTRIBUTED[name]}], lr=0.01)

    plain, model, by_hand = Network(), Network(), Network()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        train(plain, make(plain), 4)
        train(model, SDSPreconditioner(make(model), model), 4)
        train_by_hand(by_hand, make(by_hand), 4)
    finally:
        torch.distributed.destroy_process_group()
    assert_same(model, by_hand)
    assert_factors_differ(model, plain)


def test_no_row_warns_where_it_matters() -> None:
    """The filters above are for other packages: torch's own optimizers raise no warning inside the wrapper."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inner in TABLES["torch"].rows:
            model = Network()
            train(model, wrapped(inner, model, "sds"), 2)
