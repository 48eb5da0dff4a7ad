"""Bad input gets an error that names it, and leaves parameters, state and gradients as they were."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from sdsopt import Correction, Factors, LoRAPair, PairTensors, SDSPreconditioner, attach, find_pairs, link
from sdsopt.corrections import LearningRates
from sdsopt.errors import (
    InvalidCorrectionError,
    NoPairsError,
    PairShapeError,
    StaleParametersError,
    UnknownCorrectionError,
    UnsupportedGradientError,
    UnsupportedOptimizerError,
)
from toy import LoRALinear, Network, lora_linear

CORRECTIONS = ["sds", "sds-split"]


class Snapshot:
    """Everything that a failed step must leave alone."""

    def __init__(self, model: nn.Module, optimizer: SDSPreconditioner) -> None:
        self.model, self.optimizer = model, optimizer
        self.values = [p.detach().clone() for p in model.parameters()]
        self.gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
        self.state = copy.deepcopy(optimizer.state_dict())

    def assert_unchanged(self) -> None:
        for p, value, (gradient, copied) in zip(self.model.parameters(), self.values, self.gradients, strict=True):
            assert torch.equal(p, value)
            assert p.grad is gradient
            if gradient is not None and copied is not None and not gradient.is_sparse:
                torch.testing.assert_close(gradient, copied, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(self.optimizer.state_dict(), self.state, rtol=0, atol=0)


def trained(correction: str) -> tuple[Network, SDSPreconditioner]:
    model = Network()
    optimizer = SDSPreconditioner(AdamW(model.parameters(), lr=0.01), model, correction)
    model.loss().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"correction": "sdss"}, UnknownCorrectionError, r"'sdss'; known: lora, sds, sds-split, scaled"),
        ({"correction": None}, TypeError, "a name or a Correction"),
        ({"damping": -1e-3}, ValueError, r"damping .* got -0\.001"),
        ({"damping": float("nan")}, ValueError, "damping .* got nan"),
        ({"damping": float("inf")}, ValueError, "damping .* got inf"),
        ({"inverse_root": "qr"}, ValueError, "'qr'; known: auto, eigh, svd, newton_schulz"),
        ({"damping": "1e-6"}, TypeError, r"damping must be a finite number ≥ 0, got '1e-6' of type str"),
        ({"damping": None}, TypeError, "damping must be a finite number"),
        ({"max_grad_norm": "1.0"}, TypeError, r"max_grad_norm must be a positive number, .* got '1\.0' of type str"),
        ({"max_grad_norm": True}, TypeError, "max_grad_norm must be a positive number, .* got True"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be a positive number, .* got -1"),
        ({"max_workspace_bytes": 1e9}, TypeError, r"max_workspace_bytes must be a positive integer .*2\*\*30.* float"),
        ({"max_workspace_bytes": "1GB"}, TypeError, "max_workspace_bytes must be a positive integer .* got '1GB'"),
        ({"max_workspace_bytes": 0}, ValueError, "max_workspace_bytes must be a positive integer .* got 0"),
        ({"rebalance_every": 2.5}, TypeError, r"rebalance_every must be a whole number of steps .* got 2\.5"),
        ({"rebalance_every": True}, TypeError, "rebalance_every must be a whole number of steps .* got True"),
        ({"rebalance_every": 0}, ValueError, "rebalance_every must be a whole number of steps .* got 0"),
        ({"update_every": 2.5}, TypeError, r"update_every must be a whole number of steps .* got 2\.5"),
        ({"update_every": None}, TypeError, "update_every must be a whole number of steps .* got None"),
        ({"update_every": 0}, ValueError, "update_every must be a whole number of steps .* got 0"),
        ({"rescale": "norm"}, ValueError, r"rescale must be .grad_norm. or None, got 'norm'"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Network()
    with pytest.raises(error, match=message):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), model, **options)


def test_a_model_without_pairs() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(NoPairsError, match=r"no LoRA pair to correct in Sequential: 0 LoRA pairs[\s\S]*get_peft_model"):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(NoPairsError, match="empty collection"):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), [])


def test_an_optimizer_of_another_model() -> None:
    model, other = Network(), Network()
    with pytest.raises(NoPairsError, match=r"SGD holds 6 parameters, none .* 2 LoRA pairs .* the first is first\[def"):
        SDSPreconditioner(SGD(other.parameters(), lr=0.1), model)


def test_an_optimizer_of_the_head_alone() -> None:
    model = Network()
    with pytest.raises(NoPairsError, match="none of which is a factor"):
        SDSPreconditioner(SGD(model.head.parameters(), lr=0.1), model)


NO_MODELS: dict[str, Callable[[Network], Any]] = {
    "NoneType": lambda model: None,
    "generator of Parameter": lambda model: model.parameters(),
    "list of Parameter": lambda model: list(model.parameters()),
    "OrderedDict of str": lambda model: model.state_dict(),
    "SGD": lambda model: SGD(model.parameters(), lr=0.1),
    "str of str": lambda model: "sds",
}


@pytest.mark.parametrize("given", NO_MODELS)
def test_something_else_than_a_model_or_pairs(given: str) -> None:
    model = Network()
    wrong = NO_MODELS[given](model)
    calls: list[Callable[[], Any]] = [
        lambda: SDSPreconditioner(SGD(model.parameters(), lr=0.1), wrong),
        lambda: attach(NO_MODELS[given](model)),
        lambda: link(NO_MODELS[given](model)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=rf"model must be the .*, not {given}\. Pass the model itself"):
            call()


def test_model_and_optimizer_swapped() -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match="got the model, a Network: the two arguments are swapped") as e:
        SDSPreconditioner(model, SGD(model.parameters(), lr=0.1))  # pyright: ignore
    assert "\n" not in str(e.value)


class NeedsClosure(SGD):
    def step(self, closure: Callable[[], float]) -> float | None:  # pyright: ignore
        return super().step(closure)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS evaluates the loss anew"),
        (lambda p: NeedsClosure(p, lr=0.1), "NeedsClosure evaluates the loss anew"),
        (lambda p: torch.optim.SparseAdam(p), "SparseAdam takes only sparse gradients"),
        (lambda p: AdamW, "got the class AdamW itself; build the optimizer first"),
        (lambda p: None, "expected a torch.optim.Optimizer instance as first argument, got NoneType; build"),
    ],
)
def test_optimizers_that_cannot_be_wrapped(make: Callable[[Any], Any], message: str) -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match=message):
        SDSPreconditioner(make(list(model.parameters())), model)


class Around(SGD):
    """An optimizer that wraps another, as Lookahead does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], lr=0.1)
        self.optimizer = optimizer


class SharpnessAware(SGD):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class SecondOrder(SGD):
    def step(self, closure: Any = None, hessian: Any = None) -> None:  # pyright: ignore
        del hessian


class HalfMade(torch.optim.Optimizer):
    """As those wrappers that skip torch's `__init__` and define nothing in its place."""

    def __init__(self) -> None: ...

    def step(self, closure: Any = None) -> None: ...  # pyright: ignore


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SharpnessAware(p, lr=0.1), "SharpnessAware evaluates the loss anew"),
        (lambda p: SecondOrder(p, lr=0.1), "SecondOrder differentiates the gradients a second time"),
        (lambda p: Around(Around(NeedsClosure(p, lr=0.1))), "NeedsClosure evaluates the loss anew"),
        (lambda p: HalfMade(), "HalfMade has no param_groups"),
    ],
)
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_needs_more_than_a_gradient_is_known_by_what_it_has(
    make: Callable[[Any], Any], message: str, correction: str
) -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match=message):
        SDSPreconditioner(make(list(model.parameters())), model, correction)


def test_wrapping_what_wraps_a_wrapped_one() -> None:
    model = Network()
    once = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(UnsupportedOptimizerError, match=r"SDSPreconditioner corrects LoRA gradients already"):
        SDSPreconditioner(Around(once), model)


def test_wrapping_twice() -> None:
    model = Network()
    once = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(UnsupportedOptimizerError, match=r"already; wrap its \.inner"):
        SDSPreconditioner(once, model)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gradients_stay_non_finite(bad: float, correction: str) -> None:
    """So that whoever looks, such as GradScaler or a NaN detector, sees them; no exception, as with the bare one."""
    from recorder import corrected_gradients

    model = Network()
    model.loss().backward()
    assert model.first.A.grad is not None
    model.first.A.grad[0, 0] = bad
    seen = corrected_gradients(model, correction)
    assert not seen[model.first.A].isfinite().all()
    assert seen[model.first.B].isfinite().all()
    assert seen[model.second.A].isfinite().all()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_non_finite_factors_do_not_raise_and_do_not_spread_to_other_pairs(correction: str) -> None:
    from recorder import corrected_gradients

    model = Network()
    model.loss().backward()
    with torch.no_grad():
        model.first.B[0, 0] = torch.nan
    seen = corrected_gradients(model, correction)
    assert seen[model.first.A].isnan().all()
    assert seen[model.second.A].isfinite().all()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_closure_that_raises(correction: str) -> None:
    model, optimizer = trained(correction)
    before = Snapshot(model, optimizer)

    def closure() -> float:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        optimizer.step(closure)
    before.assert_unchanged()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_an_inner_optimizer_that_raises_at_once(correction: str) -> None:
    model = Network()

    class Failing(SGD):
        def step(self, closure: Any = None) -> None:  # pyright: ignore
            raise RuntimeError("no")

    optimizer = SDSPreconditioner(Failing(model.parameters(), lr=0.1), model, correction)
    model.loss().backward()
    before = Snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="no"):
        optimizer.step()
    before.assert_unchanged()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_correction_that_raises(correction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained(correction)
    before = Snapshot(model, optimizer)
    calls: list[int] = []
    original = type(optimizer.correction).precondition

    def second_fails(self: Any, factors: Any, gradients: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("at the second pair")
        return original(self, factors, gradients)

    monkeypatch.setattr(type(optimizer.correction), "precondition", second_fails)
    with pytest.raises(RuntimeError, match="at the second pair"):
        optimizer.step()
    before.assert_unchanged()


def test_an_update_correction_that_raises_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner optimizer has stepped by then, so its state cannot be given back."""
    _, optimizer = trained("sds-split")

    def fails(*_: Any) -> Any:
        raise RuntimeError("after the step")

    monkeypatch.setattr(type(optimizer.correction), "postcondition", fails)
    with pytest.raises(RuntimeError, match="after the step"):
        optimizer.step()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_replaced_factor(correction: str) -> None:
    model, optimizer = trained(correction)
    model.first.A = model.first.A.detach()
    model.first.A.grad = torch.ones_like(model.first.A)
    before = Snapshot(model, optimizer)
    with pytest.raises(StaleParametersError, match=r"factor A of first\[default\] was replaced .* Build the optimizer"):
        optimizer.step()
    before.assert_unchanged()


def test_a_deleted_adapter() -> None:
    model, optimizer = trained("sds")
    del model.first.lora_A["default"]
    before = Snapshot(model, optimizer)
    with pytest.raises(StaleParametersError, match=r"factor A of first\[default\] is gone"):
        optimizer.step()
    before.assert_unchanged()


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_factors_moved_in_place_are_followed(correction: str) -> None:
    """`module.to` keeps the Parameters and changes their data."""
    model, reference = Network(), Network().double()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model, correction)
    model.double()
    other = SDSPreconditioner(SGD(reference.parameters(), lr=0.1), reference, correction)
    for net, opt in ((model, optimizer), (reference, other)):
        net.loss().backward()
        opt.step()
    assert model.first.A.dtype == torch.float64
    torch.testing.assert_close(model.first.A, reference.first.A, rtol=1e-6, atol=1e-6)


def test_factors_that_do_not_fit_together() -> None:
    model = LoRALinear(torch.ones(3, 5), torch.ones(4, 2))
    with pytest.raises(PairShapeError, match=r"A is \(3, 5\), B is \(4, 2\).* ranks are 3 and 2"):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)


def test_factors_that_stop_fitting_together() -> None:
    model, optimizer = trained("sds")
    model.first.lora_B["default"].weight.data = torch.ones(12, 2)  # pyright: ignore
    model.first.B.grad = torch.ones(12, 2)
    before = Snapshot(model, optimizer)
    with pytest.raises(PairShapeError, match="do not fit together"):
        optimizer.step()
    before.assert_unchanged()


def test_sparse_gradients() -> None:
    model, optimizer = trained("sds")
    assert model.first.A.grad is not None
    model.first.A.grad = model.first.A.grad.to_sparse()
    before = Snapshot(model, optimizer)
    with pytest.raises(UnsupportedGradientError, match=r"factor A of first\[default\] .*sparse.*sparse=False"):
        optimizer.step()
    before.assert_unchanged()


def test_a_step_that_corrects_nothing_warns_once() -> None:
    model, optimizer = trained("sds")

    def step() -> None:
        for parameter in (*model.first.parameters(), *model.second.parameters()):
            parameter.grad = None
        optimizer.step()

    with pytest.warns(UserWarning, match="corrected nothing: none of the 2 LoRA pairs has a gradient") as caught:
        step()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step()


def test_a_step_without_any_gradient_is_silent() -> None:
    """As with every optimizer; nothing was asked for."""
    model, optimizer = trained("sds")
    optimizer.zero_grad()
    before = Snapshot(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    before.assert_unchanged()


def test_pairs_given_by_hand_may_be_some_of_the_models() -> None:
    model = Network()
    first: list[LoRAPair] = [pair for pair in find_pairs(model) if pair.name.startswith("first")]
    optimizer = SDSPreconditioner(Adam(model.parameters(), lr=0.1), first)
    assert [pair.name for pair in optimizer.pairs] == ["first[default]"]


def test_another_optimizers_factors_are_left_alone() -> None:
    """Two optimizers share one model: each corrects its own."""
    model = Network()
    one = SDSPreconditioner(SGD(model.first.parameters(), lr=0.1), model)
    two = SGD(model.second.parameters(), lr=0.1)
    model.loss().backward()
    before = model.second.A.detach().clone()
    one.step()
    assert torch.equal(model.second.A, before)
    two.step()
    assert model.second.A.grad is not None
    # As SGD does it: some processors round a multiplication with an addition once, and not twice.
    assert torch.equal(model.second.A, before.add(model.second.A.grad, alpha=-0.1))


def test_a_single_lora_layer_is_a_model_too() -> None:
    model = lora_linear()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    assert len(optimizer.pairs) == 1


def test_a_deleted_adapter_that_was_never_trained_is_no_concern() -> None:
    model = Network()
    layer = next(module for module in model.modules() if isinstance(module, LoRALinear))
    for factors in (layer.lora_A, layer.lora_B):
        factors["other"] = copy.deepcopy(factors["default"]).requires_grad_(False)
    layer.scaling["other"] = 1.0
    optimizer = SDSPreconditioner(SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model)
    count = len(optimizer.pairs)
    for factors in (layer.lora_A, layer.lora_B):
        del factors["other"]
    before = copy.deepcopy(model.state_dict())
    model.loss().backward()
    assert list(optimizer.diagnostics()) == ["first[default]", "second[default]"]
    optimizer.step()
    assert len(optimizer.pairs) == count
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items() if "lora" in name)


def test_a_correction_may_keep_all_of_a_pair_from_stepping() -> None:
    """And maps the others' updates all the same."""

    class Half(Correction):
        @property
        def uses_updates(self) -> bool:
            return True

        def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
            return PairTensors(None, None) if factors.scaling == 1.5 else gradients

        def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
            return updates.map(lambda update: update / 2)

    layers = [lora_linear(200, 100, 4, scaling=scaling) for scaling in (1.5, 1.0)]
    model = nn.ModuleList(layers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(model)
    SDSPreconditioner(SGD(model.parameters(), lr=1.0), model, Half()).step()
    for moved, (one, other) in zip((0.0, 0.5), zip(before, model, strict=True), strict=True):
        for old, new in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(old - new, torch.full_like(old, moved))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda g: None, "returned NoneType for its gradients, not PairTensors"),
        (lambda g: (g.A, g.B), "returned tuple"),
        (lambda g: PairTensors(g.A[0], g.B), r"shape \(4, 10\) for factor A, not \(1, 4, 10\)"),
        (lambda g: PairTensors(g.B, g.A), "for factor A"),
        (lambda g: PairTensors(g.A, torch.zeros(1, 12, 4)), "for factor B, not None"),
    ],
)
def test_what_a_correction_returns_is_checked(returned: Callable[[PairTensors], Any], message: str) -> None:
    class Wrong(Correction):
        def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
            return returned(gradients)

        def __repr__(self) -> str:
            return "Wrong()"

    layer = lora_linear(12, 10, 4)
    layer.backward_from(torch.ones(12, 10))
    if "not None" in message:
        layer.B.grad = None
    optimizer = SDSPreconditioner(AdamW(layer.parameters(), lr=0.1), layer, Wrong())
    snapshot = Snapshot(layer, optimizer)
    with pytest.raises(InvalidCorrectionError, match=rf"^Wrong\(\) returned .*{message.removeprefix('returned ')}"):
        optimizer.step()
    snapshot.assert_unchanged()


def test_gradients_of_another_dtype_than_their_parameters() -> None:
    layer = lora_linear(20, 10, 4).to(torch.bfloat16)
    exact = copy.deepcopy(layer).float()
    for parameter, other in zip(layer.parameters(), exact.parameters(), strict=True):
        parameter.grad_dtype = torch.float32  # pyright: ignore[reportAttributeAccessIssue]
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        other.grad = parameter.grad.clone()
    seen: list[list[torch.Tensor]] = []
    for model in (layer, exact):
        optimizer = SDSPreconditioner(Seeing(model.parameters(), lr=0.1), model)
        optimizer.step()
        seen.append(optimizer.inner.seen)  # pyright: ignore[reportAttributeAccessIssue]
    for one, other in zip(*seen, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Seeing(SGD):
    """Keeps what gradients it is given."""

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()
