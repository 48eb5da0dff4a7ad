"""What torch, its schedulers, its scaler and the trainers rely on in an optimizer."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sdsopt import SDSPreconditioner
from toy import Network, assert_same, train


def wrapped(model: Network | None = None, correction: str = "sds", lr: float = 0.01) -> SDSPreconditioner:
    model = Network() if model is None else model
    return SDSPreconditioner(AdamW(model.parameters(), lr=lr), model, correction)


def overridden() -> list[str]:
    found = [name for name in vars(SDSPreconditioner) if callable(getattr(Optimizer, name, None))]
    return [name for name in found if name not in {"__init__", "__module__", "__doc__"}]


def test_methods_that_override_torchs_have_its_parameters() -> None:
    assert {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"} <= set(overridden())
    for name in overridden():
        ours, theirs = (inspect.signature(getattr(cls, name)).parameters for cls in (SDSPreconditioner, Optimizer))
        assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()], name


def test_it_is_an_optimizer_of_the_inner_ones_groups_state_and_defaults() -> None:
    optimizer = wrapped()
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults


def test_assigning_groups_state_or_defaults_reaches_the_inner_optimizer() -> None:
    """As ZeRO and `load_state_dict` do."""
    optimizer = wrapped()
    groups, state, defaults = [{**optimizer.param_groups[0], "lr": 5.0}], {}, {"lr": 7.0}
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    assert optimizer.inner.param_groups is groups
    assert optimizer.inner.state is state
    assert optimizer.inner.defaults is defaults


def test_the_groups_stay_the_inner_ones_after_loading() -> None:
    """Accelerate loads the optimizer's own state dict, which replaces the groups."""
    optimizer = wrapped()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.inner.param_groups[0]["lr"] == 0.5


def test_each_hook_runs_once() -> None:
    model = Network()
    optimizer = wrapped(model)
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.append(name)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.inner.register_step_pre_hook(note("inner pre")),
        optimizer.inner.register_step_post_hook(note("inner post")),
        optimizer.register_state_dict_pre_hook(note("state dict pre")),
        optimizer.register_state_dict_post_hook(note("state dict post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
    ]
    try:
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    once = ["pre", "global pre", "inner pre", "inner post", "global post", "post"]
    assert sorted(calls[:6]) == sorted(once)
    assert calls[0] == "pre"
    assert calls[5] == "post"
    assert calls[6:] == ["state dict pre", "state dict post", "load pre", "load post"]


def test_hooks_may_change_what_they_are_given() -> None:
    optimizer = wrapped()
    seen: list[float] = []

    def closure_of(value: float) -> Callable[[], float]:
        return lambda: value

    optimizer.register_step_pre_hook(lambda *_: ((optimizer, closure_of(3.0)), {}))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["extra"]) or None)
    assert optimizer.step(closure_of(1.0)) == 3.0
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_copies_train_on_exactly_like_the_original(copied: Callable[[Any], Any], correction: str) -> None:
    model = Network()
    optimizer = wrapped(model, correction)
    train(model, optimizer)
    other_model, other = copied((model, optimizer))
    assert isinstance(other, SDSPreconditioner)
    assert other.inner is not optimizer.inner
    train(model, optimizer, first=3)
    train(other_model, other, first=3)
    assert_same(model, other_model)


def test_closures_run_once_with_gradients_enabled() -> None:
    model, plain = Network(), Network()
    optimizer, without_closure = wrapped(model), wrapped(plain)
    calls: list[float] = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    with torch.no_grad():
        assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    train(plain, without_closure, 1)
    assert_same(model, plain)


def test_raw_gradients_are_back_after_the_step() -> None:
    model = Network()
    optimizer = wrapped(model)
    model.loss().backward()
    raw = {p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None}
    assert len(raw) == 6
    optimizer.step()
    for parameter, (gradient, value) in raw.items():
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_an_inner_optimizer_that_frees_gradients_keeps_them_freed() -> None:
    class Freeing(SGD):
        def step(self, closure: Any = None) -> None:  # pyright: ignore
            super().step(closure)
            self.zero_grad()

    model = Network()
    optimizer = SDSPreconditioner(Freeing(model.parameters(), lr=0.1), model)
    model.loss().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


def test_state_dicts_pass_weights_only_loading() -> None:
    """Hugging Face's Trainer resumes with it."""
    model = Network()
    optimizer = wrapped(model)
    train(model, optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert set(loaded) == {"state", "param_groups"}
    optimizer.load_state_dict(state_dict=loaded)  # by keyword, as torch's distributed checkpoint does
    assert type(optimizer.state_dict()["state"]) is dict


def test_distributed_checkpoint_functions() -> None:
    """They take a fake step with zero gradients and zero learning rate to create the state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Network()
    optimizer = wrapped(model, "sds-split")
    train(model, optimizer)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    fresh_model = copy.deepcopy(model)
    fresh = wrapped(fresh_model, "sds-split")
    set_optimizer_state_dict(fresh_model, fresh, saved)
    assert_same(model, fresh_model)
    train(model, optimizer, first=3)
    train(fresh_model, fresh, first=3)
    assert_same(model, fresh_model)


def test_added_groups_are_corrected_too() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.first.parameters(), lr=0.1), model)
    model.loss().backward()
    before = copy.deepcopy(model.second)
    optimizer.step()
    assert_same(model.second, before)
    optimizer.add_param_group({"params": list(model.second.parameters()), "lr": 0.2})
    assert optimizer.inner.param_groups[1]["lr"] == 0.2
    optimizer.step()

    reference = Network()
    reference.second.load_state_dict(before.state_dict())
    whole = SDSPreconditioner(SGD(reference.second.parameters(), lr=0.2), reference)
    reference.second.A.grad, reference.second.B.grad = model.second.A.grad, model.second.B.grad
    whole.step()
    assert_same(model.second, reference.second)


def test_A_and_B_in_groups_of_their_own() -> None:
    """LoRA+ gives B a higher rate; the pair is still one."""
    model, reference = Network(), Network()
    groups = [{"params": [model.first.A, model.second.A]}, {"params": [model.first.B, model.second.B], "lr": 0.1}]
    optimizer = SDSPreconditioner(SGD(groups, lr=0.1), model)
    whole = SDSPreconditioner(
        SGD([p for m in (reference.first, reference.second) for p in m.parameters()], lr=0.1), reference
    )
    train(model, optimizer)
    train(reference, whole)
    assert_same(model, reference)


def test_public_extras_of_the_inner_optimizer_are_forwarded() -> None:
    class ScheduleFree(SGD):
        mode = "eval"

        def train(self) -> None:
            self.mode = "train"

    model = Network()
    optimizer = SDSPreconditioner(ScheduleFree(model.parameters(), lr=0.1), model)
    optimizer.train()
    assert optimizer.mode == "train"
    assert not hasattr(optimizer, "eval")
    assert not hasattr(optimizer, "_private")
    assert not hasattr(SDSPreconditioner.__new__(SDSPreconditioner), "anything")


def test_zero_grad() -> None:
    model = Network()
    optimizer = wrapped(model)
    model.loss().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_repr_names_correction_pairs_and_inner_optimizer() -> None:
    text = repr(wrapped())
    assert "GramPower(exponent=0.5" in text
    assert "2 LoRA pairs" in text
    assert "AdamW" in text


def test_pairs_instead_of_a_model() -> None:
    from sdsopt import find_pairs

    model, reference = Network(), Network()
    pairs = find_pairs(model)
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), (pair for pair in pairs))
    assert list(optimizer.pairs) == list(pairs)
    train(model, optimizer)
    train(reference, SDSPreconditioner(SGD(reference.parameters(), lr=0.1), reference))
    assert_same(model, reference)


def test_parameters_outside_pairs_are_the_inner_optimizers_alone() -> None:
    model = Network()
    optimizer = SDSPreconditioner(SGD(model.parameters(), lr=0.1), model, "sds-split")
    before = copy.deepcopy(model.head)
    model.loss().backward()
    optimizer.step()
    for parameter, old in zip(model.head.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old - 0.1 * parameter.grad)  # pyright: ignore
