"""Attaching and removing, mistakes, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.optimizer import register_optimizer_step_post_hook as after_steps
from torch.optim.optimizer import register_optimizer_step_pre_hook as before_steps

from sdsopt import Correction, Factors, GramPower, KeepNorm, PairTensors, SDSPreconditioner, attach, find_pairs
from sdsopt.errors import DoubleCorrectionError, NoPairsError, StaleParametersError, UnsupportedCorrectionError
from tiny_models import MODELS
from toy import Network, assert_same


def first_gradient(model: Network) -> torch.Tensor:
    model.zero_grad()
    model.loss().backward()
    assert model.first.A.grad is not None
    return model.first.A.grad.clone()


def test_removed_hooks_leave_raw_gradients() -> None:
    model = Network()
    raw = first_gradient(model)
    handle = attach(model)
    corrected = first_gradient(model)
    handle.remove()
    handle.remove()
    assert not torch.equal(raw, corrected)
    assert torch.equal(first_gradient(model), raw)
    assert handle.num_factors == 0
    with attach(model) as handle:
        assert handle.num_factors == 4
        assert torch.equal(first_gradient(model), corrected)
    assert torch.equal(first_gradient(model), raw)


def test_hooks_come_off_after_an_error() -> None:
    model = Network()
    raw = first_gradient(model)
    with pytest.raises(KeyError), attach(model):
        raise KeyError
    assert torch.equal(first_gradient(model), raw)


def test_attaching_twice_corrects_once() -> None:
    model = Network()
    first = attach(model)
    corrected = first_gradient(model)
    second = attach(model, "sds")
    assert torch.equal(first_gradient(model), corrected)
    second.remove()
    assert first.num_factors == 0


def test_attaching_again_adds_what_is_new() -> None:
    model, _ = MODELS["llama"]()
    before = attach(model).num_factors
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    handle = attach(model)
    assert handle.num_factors == before + 2 * 2
    assert len(handle.pairs) == before // 2 + 2
    model.set_adapter("default")
    model.delete_adapter("second")
    assert handle.num_factors == before


def test_other_options_on_the_same_model_are_refused() -> None:
    model = Network()
    attach(model, "sds")
    raw = first_gradient(model)
    for options in ({"correction": "scaled"}, {"damping": 1e-3}, {"inverse_root": "svd"}):
        with pytest.raises(DoubleCorrectionError, match=r"already, by GramPower\(exponent=0.5"):
            attach(model, **options)  # pyright: ignore
    assert torch.equal(first_gradient(model), raw)


def test_wrapping_what_is_attached_is_refused() -> None:
    model = Network()
    with attach(model), pytest.raises(DoubleCorrectionError, match=r"factor . of first\[default\].*second time"):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)


def test_attaching_what_is_wrapped_fails_at_the_step_and_changes_nothing() -> None:
    model = Network()
    optimizer = SDSPreconditioner(AdamW(model.parameters(), lr=0.1), model)
    attach(model)
    before = copy.deepcopy(model)
    model.loss().backward()
    with pytest.raises(DoubleCorrectionError, match="Use one of the two"):
        optimizer.step()
    assert_same(model, before)
    assert not optimizer.state


class Pairwise(Correction):
    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        return gradients


@pytest.mark.parametrize(
    ("correction", "message"),
    [
        ("sds-split", r"'sds-split' maps the step .* SDSPreconditioner\(optimizer, model, correction='sds-split'\)"),
        (GramPower(0.5, 0.5), "maps the step that the optimizer takes"),
        (KeepNorm(GramPower(0.5)), "needs both gradients of a pair, or the whole accumulated gradient"),
        (Pairwise(), "linear_per_factor return True"),
    ],
)
def test_corrections_that_need_the_wrapper_say_so(correction: Any, message: str) -> None:
    model = Network()
    raw = first_gradient(model)
    with pytest.raises(UnsupportedCorrectionError, match=message):
        attach(model, correction)
    assert torch.equal(first_gradient(model), raw)


def test_models_with_nothing_to_correct() -> None:
    with pytest.raises(NoPairsError, match="found no LoRA pair"):
        attach(nn.Linear(2, 2))
    with pytest.raises(NoPairsError, match=r"all 2 LoRA pairs are frozen \(the first is first\[default\]\)"):
        attach(Network().requires_grad_(False))
    with pytest.raises(ValueError, match="damping"):
        attach(Network(), damping=-1.0)


def test_an_adapter_made_trainable_later_is_not_trained_uncorrected() -> None:
    model, batch = MODELS["llama"]()
    model.add_adapter("late", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = attach(model)
    model.set_adapter("late")
    model(**batch).loss.backward()
    before = copy.deepcopy(model)
    with pytest.raises(StaleParametersError, match=r"late\] was not corrected.*Call attach\(model\) again"):
        optimizer.step()
    assert_same(model, before)
    optimizer.zero_grad()
    SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()  # a stranger's step goes on
    attach(model)
    model(**batch).loss.backward()
    optimizer.step()
    handle.remove()


def with_second_adapter(*, first_steps: int = 1) -> tuple[Any, Any, SGD]:
    """An attached model that has trained, then got an adapter, and an optimizer that has got it too."""
    model, batch = MODELS["llama"]()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(model)
    for _ in range(first_steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")
    optimizer.add_param_group({"params": [p for p in model.parameters() if p.requires_grad]})
    return model, batch, optimizer


@pytest.mark.parametrize("first_steps", [0, 1])
def test_an_adapter_added_later_is_not_trained_uncorrected(first_steps: int) -> None:
    model, batch, optimizer = with_second_adapter(first_steps=first_steps)
    model(**batch).loss.backward()
    before = copy.deepcopy(model)
    for _ in range(2):  # not only the first time
        with pytest.raises(StaleParametersError, match=r"second\] was not corrected: the parameter was added,"):
            optimizer.step()
    assert_same(model, before)
    optimizer.zero_grad()
    handle = attach(model)
    model(**batch).loss.backward()
    optimizer.step()
    handle.remove()
    model(**batch).loss.backward()
    optimizer.step()  # nobody asks for a correction any more


def test_a_model_is_looked_through_for_new_parameters_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[nn.Module] = []

    def counting(model: nn.Module, *, include_frozen: bool) -> Any:
        looks.append(model)
        return find_pairs(model, include_frozen=include_frozen)

    monkeypatch.setattr("sdsopt.engine.backward.find_pairs", counting)
    model = Network()
    factors = SGD([*model.first.parameters(), *model.second.parameters()], lr=0.1)
    head = SGD(model.head.parameters(), lr=0.1)
    attach(model)
    for _ in range(3):
        model.loss().backward()
        factors.step()
    assert not looks
    for _ in range(3):
        head.step()
    assert looks == [model]


def test_pairs_given_by_hand_stay_the_only_ones() -> None:
    """Nothing is known of a model then, and other pairs may be left raw on purpose."""
    model = Network()
    attach(find_pairs(model)[:1])
    model.loss().backward()
    SGD(model.parameters(), lr=0.1).step()
    assert attach(model).num_factors == 4


def test_replaced_parameters_are_noticed() -> None:
    model = Network()
    attach(model)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    model.loss().backward()
    with pytest.raises(StaleParametersError, match=r"factor A of first\[default\] was not corrected"):
        optimizer.step()


def test_copies_have_no_hooks_and_the_original_keeps_them() -> None:
    """Exponential moving averages copy the model."""
    model = Network()
    raw = first_gradient(model)
    handle = attach(model)
    assert torch.equal(first_gradient(copy.deepcopy(model)), raw)
    assert torch.equal(first_gradient(pickle.loads(pickle.dumps(model))), raw)
    assert handle.num_factors == 4
    assert not torch.equal(first_gradient(model), raw)


def test_a_forgotten_handle_keeps_no_model_alive() -> None:
    model = Network()
    attach(model)
    model.loss().backward()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_wrapped_model_is_freed_while_the_caller_still_runs() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    gone = weakref.ref(model)
    del model, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("register", [before_steps, after_steps])
def test_garbage_collected_in_the_middle_of_a_step(register: Callable[..., Any]) -> None:
    """torch goes through the hooks for all optimizers then."""

    def collect(*_: Any) -> None:
        gc.collect()

    model = Network()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model)
    attach(model)
    model.first.cycle = [optimizer]
    gone = weakref.ref(model.first)
    gc.collect()
    del model, optimizer
    assert gone() is not None
    handles = [register(collect) for _ in range(2)]  # one goes on after the other
    try:
        SGD([nn.Parameter(torch.ones(1))], lr=0.1).step()
        assert gone() is None
    finally:
        for handle in handles:
            handle.remove()


def test_a_failed_backward_leaves_no_stale_roots() -> None:
    model, fresh = Network(), Network()
    attach(model)

    def fail(gradient: torch.Tensor) -> None:
        raise KeyError

    remover = model.first.A.register_hook(fail)
    with pytest.raises(KeyError):
        model.loss().backward()
    remover.remove()
    for network in (model, fresh):
        with torch.no_grad():
            network.second.B.mul_(2)
    attach(fresh)
    assert torch.equal(first_gradient(model), first_gradient(fresh))


def test_repr() -> None:
    model = Network()
    handle = attach(model)
    assert repr(handle).startswith("Handle(GramPower(exponent=0.5")
    assert repr(handle).endswith("4 factors of 2 LoRA pairs)")
    assert handle.correction == GramPower(0.5)
    assert [pair.name for pair in handle.pairs] == [pair.name for pair in find_pairs(model)]
