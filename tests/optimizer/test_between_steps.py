"""Corrections that act between steps: what they remember, and that it survives every kind of checkpoint."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adamax, AdamW, Optimizer, RMSprop

import sdsopt
from sdsopt import AltLoRA, Correction, Factors, MatrixMoment, PairTensors, SDSPreconditioner, TrackBasis, find_pairs
from sdsopt.corrections import GramPower
from sdsopt.errors import UnsupportedCorrectionError, UnsupportedOptimizerError
from toy import Network, assert_same, train

COUNT = "sdsopt_steps"

OPTIONS: dict[str, dict[str, Any]] = {
    "transport": {"correction": "sds", "transport": "moments"},
    "rebalance": {"correction": "sds-split", "rebalance_every": 2},
    "both": {"correction": "sds-split", "rebalance_every": 3, "transport": "moments"},
    "rescaled": {"correction": "scaled", "rebalance_every": 2, "transport": "moments", "rescale": "grad_norm"},
    "altlora": {"correction": "altlora"},
    "lora-rite": {"correction": "lora-rite"},
    "lora-rite-matrix": {"correction": "lora-rite-matrix"},
    "lora-rite-matrix, rebalanced": {"correction": "lora-rite-matrix", "rebalance_every": 2},
    "lora-rite-matrix, rescaled": {"correction": "lora-rite-matrix", "rescale": "grad_norm"},
    "altlora, rebalanced": {"correction": AltLoRA(every=2), "rebalance_every": 3},
}
# What each is beyond: the same steps without anything between them.
PLAIN = {"altlora": "scaled", "lora-rite": "sds-split", "lora-rite-matrix": "sds-split"}
MEMORY = {"sdsopt_second_moment", "sdsopt_escaped_mass", "sdsopt_weight"}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def adamw(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def wrapped(model: Network, options: dict[str, Any], inner: Optimizer | None = None) -> SDSPreconditioner:
    return SDSPreconditioner(adamw(model) if inner is None else inner, model, **options)


def through_disk(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def differs(one: nn.Module, other: nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def counts(options: dict[str, Any]) -> bool:
    return "rebalance_every" in options or options["correction"] == "altlora"


@every_option
def test_it_acts(options: dict[str, Any]) -> None:
    model, plain = Network(), Network()
    train(model, wrapped(model, options), 4)
    without = {k: v for k, v in options.items() if k in ("correction", "rescale")}
    name = "altlora" if isinstance(without["correction"], AltLoRA) else without["correction"]
    without["correction"] = PLAIN.get(name, name)
    train(plain, wrapped(plain, without), 4)
    assert differs(model, plain)


@every_option
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("inner", [adamw, lambda m: SGD(m.parameters(), lr=0.05, momentum=0.9)], ids=["adamw", "sgd"])
def test_resume_equals_uninterrupted(options: dict[str, Any], stop: int, inner: Any) -> None:
    """Bit for bit, at every place in the schedules."""
    model = Network()
    optimizer = wrapped(model, options, inner(model))
    train(model, optimizer, stop)
    resumed = Network()
    resumed.load_state_dict(model.state_dict())
    state = through_disk(optimizer.state_dict())
    train(model, optimizer, 4, first=stop)

    again = wrapped(resumed, options, inner(resumed))
    again.load_state_dict(state)
    train(resumed, again, 4, first=stop)
    assert_same(model, resumed)


@every_option
def test_resume_through_the_distributed_checkpoint_functions(options: dict[str, Any]) -> None:
    """They take a fake step with zero gradients and zero rates, which must not count."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Network()
    optimizer = wrapped(model, options)
    train(model, optimizer, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    fresh_model = copy.deepcopy(model)
    fresh = wrapped(fresh_model, options)
    set_optimizer_state_dict(fresh_model, fresh, saved)
    assert_same(model, fresh_model)
    train(model, optimizer, 3, first=3)
    train(fresh_model, fresh, 3, first=3)
    assert_same(model, fresh_model)


@every_option
def test_the_fake_step_of_checkpoints_changes_nothing(options: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, untouched = Network(), Network()
    optimizer = wrapped(model, options)
    get_optimizer_state_dict(model, optimizer)
    assert COUNT not in optimizer.param_groups[0]
    assert_same(model, untouched)


@every_option
def test_its_state_is_the_inner_ones_and_at_most_a_count_and_a_memory(options: dict[str, Any]) -> None:
    model, bare_model = Network(), Network()
    optimizer, bare = wrapped(model, options), adamw(bare_model)
    train(model, optimizer, 4)
    train(bare_model, bare, 4)
    ours, theirs = optimizer.state_dict(), bare.state_dict()
    assert ours["param_groups"][0].pop(COUNT, 0) == (4 if counts(options) else 0)
    assert ours["param_groups"] == theirs["param_groups"]
    memory = MEMORY if options["correction"] == "lora-rite-matrix" else set[str]()
    names = [name for name, _ in model.named_parameters()]
    for index, state in theirs["state"].items():
        assert set(ours["state"][index]) == set(state) | (memory if "lora" in names[index] else set())


@every_option
@pytest.mark.parametrize("way", ["bare to wrapped", "wrapped to bare"])
def test_checkpoints_move_both_ways(options: dict[str, Any], way: str) -> None:
    model = Network()
    first = adamw(model) if way == "bare to wrapped" else wrapped(model, options)
    train(model, first, 3)
    state = through_disk(first.state_dict())
    other = copy.deepcopy(model)
    second = wrapped(other, options) if way == "bare to wrapped" else adamw(other)
    second.load_state_dict(state)
    train(other, second, 2, first=3)
    assert differs(model, other)
    assert all(p.isfinite().all() for p in other.parameters())
    if way == "bare to wrapped" and counts(options):
        assert second.param_groups[0][COUNT] == 2  # from the start, where nothing was counted


@every_option
def test_a_step_that_fails_changes_nothing(options: dict[str, Any]) -> None:
    class Failing(AdamW):
        fails = False

        def step(self, closure: Any = None) -> None:  # pyright: ignore
            if self.fails:
                raise RuntimeError("out of memory")
            super().step(closure)

    model = Network()
    inner = Failing(model.parameters(), lr=0.01)
    optimizer = wrapped(model, options, inner)
    train(model, optimizer, 2)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    inner.fails = True
    model.zero_grad()
    model.loss(2).backward()
    raw = {p: (p.grad, p.grad.clone()) for p in model.parameters() if p.grad is not None}
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert_same(model, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is gradient and torch.equal(gradient, value) for p, (gradient, value) in raw.items())


@every_option
def test_copies_train_on_like_the_original(options: dict[str, Any]) -> None:
    model = Network()
    optimizer = wrapped(model, options)
    train(model, optimizer, 3)
    other_model, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, first=3)
    train(other_model, other, 3, first=3)
    assert_same(model, other_model)


@every_option
def test_zero_learning_rate_means_no_motion(options: dict[str, Any]) -> None:
    model, untouched = Network(), Network()
    optimizer = wrapped(model, options, AdamW(model.parameters(), lr=0.0))
    train(model, optimizer, 4)
    assert_same(model, untouched)


@every_option
def test_steps_that_a_scaler_skips_do_not_count(options: dict[str, Any]) -> None:
    model = Network()
    optimizer = wrapped(model, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # pyright: ignore
    scaler.scale(model.loss() * torch.inf).backward()
    scaler.step(optimizer)
    assert COUNT not in optimizer.param_groups[0]
    assert_same(model, Network())


def test_groups_added_later_and_groups_of_their_own() -> None:
    """LoRA+ gives B a group of its own; the pair is still one."""
    model = Network()
    inner = AdamW([{"params": [model.first.A, model.second.A]}], lr=0.01)
    optimizer = wrapped(model, {"correction": "altlora"}, inner)
    model.requires_grad_(False)
    for factor in (model.first.A, model.second.A):
        factor.requires_grad_()
    train(model, optimizer, 1)
    model.requires_grad_()
    optimizer.add_param_group({"params": [model.first.B, model.second.B], "lr": 0.05})
    train(model, optimizer, 1, first=1)
    assert [group[COUNT] for group in optimizer.param_groups] == [2, 2]


def test_max_grad_norm_passes_over_the_factor_that_waits() -> None:
    model, reference = Network(), Network()
    train(model, wrapped(model, {"correction": "altlora", "max_grad_norm": 1e-3}, SGD(model.parameters(), lr=1.0)), 1)
    with torch.no_grad():
        moved = sum((p - q).square().sum() for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    torch.testing.assert_close(torch.as_tensor(moved).sqrt(), torch.tensor(1e-3), rtol=1e-3, atol=0)


# Refusals


NEED_KNOWN_MOMENTS: list[dict[str, Any]] = [
    {"transport": "moments"},
    {"rebalance_every": 5},
    {"correction": "altlora"},
    {"correction": "lora-rite"},
    {"correction": "lora-rite-matrix"},
]


@pytest.mark.parametrize("options", NEED_KNOWN_MOMENTS)
@pytest.mark.parametrize("inner", [RMSprop, Adamax, Adagrad])
def test_optimizers_whose_memory_is_not_known(inner: Any, options: dict[str, Any]) -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match=rf"{inner.__name__} is not among those known.*AdamW"):
        wrapped(model, options, inner(model.parameters()))


def test_an_optimizer_of_the_same_name_that_keeps_other_things() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match=r"bitsandbytes\S*AdamW8bit is not among those known"):
        wrapped(model, {"transport": "moments"}, bitsandbytes.optim.AdamW8bit(model.parameters()))


def test_without_moments_there_is_nothing_to_carry() -> None:
    model = Network()
    with pytest.raises(UnsupportedOptimizerError, match="SGD without momentum keeps no moments"):
        wrapped(model, {"transport": "moments"}, SGD(model.parameters(), lr=0.1))
    wrapped(model, {"rebalance_every": 2}, SGD(model.parameters(), lr=0.1))  # there the factors alone are enough


class Sign(Correction):
    """In no basis."""

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        return gradients.map(Tensor.sign)


@pytest.mark.parametrize("options", [{"transport": "moments"}, {"rebalance_every": 5}])
def test_corrections_without_a_basis(options: dict[str, Any]) -> None:
    model = Network()
    with pytest.raises(UnsupportedCorrectionError, match="basis_exponent is None"):
        wrapped(model, {"correction": Sign(), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rebalance_every": 0}, "rebalance_every must be a whole number of steps"),
        ({"transport": "momentum"}, 'transport must be "moments" or None'),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrapped(Network(), options)


@pytest.mark.parametrize(
    "correction",
    [
        "altlora",
        MatrixMoment(GramPower(0.5)),
        TrackBasis(GramPower(0.5)),
        TrackBasis(GramPower(0.5), False, balance_every=3),
    ],
)
def test_hook_mode_refuses_them_by_name(correction: str | Correction) -> None:
    name = correction if isinstance(correction, str) else type(correction).__name__
    with pytest.raises(UnsupportedCorrectionError, match=rf"{name}.*between the optimizer's steps"):
        sdsopt.attach(Network(), correction)


def test_factors_in_half_precision_are_not_rebalanced() -> None:
    model = Network(dtype=torch.bfloat16)
    with pytest.raises(UnsupportedCorrectionError, match=r"first.*torch.bfloat16"):
        wrapped(model, {"rebalance_every": 2})
    train(model, wrapped(model, {"transport": "moments"}), 3)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_memory_is_not_kept_in_half_precision() -> None:
    model = Network(dtype=torch.bfloat16)
    with pytest.raises(UnsupportedCorrectionError, match=r"first.*torch.bfloat16.*would lose what it remembers"):
        wrapped(model, {"correction": "lora-rite-matrix"})


def test_pairs_of_which_one_factor_is_not_ours_are_not_rebalanced() -> None:
    model = Network()
    inner = AdamW([model.first.B, model.second.B])
    with pytest.raises(UnsupportedCorrectionError, match="trains at most one of each"):
        wrapped(model, {"rebalance_every": 2}, inner)


@pytest.mark.parametrize("options", NEED_KNOWN_MOMENTS)
def test_adalora_is_refused(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", exc_type=ImportError)
    base = nn.Sequential(nn.Linear(6, 8))
    model = peft.get_peft_model(base, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0"]))
    assert find_pairs(model)
    with pytest.raises(UnsupportedCorrectionError, match="AdaLoRA"):
        SDSPreconditioner(AdamW(p for p in model.parameters() if p.requires_grad), model, **options)


def adamw_like(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01)


def sgd_like(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.01, momentum=0.9)


@pytest.mark.parametrize(
    ("cls", "options", "inner"),
    [(sdsopt.SDSAdamW, {}, adamw_like), (sdsopt.SDSSGD, {"momentum": 0.9}, sgd_like)],
    ids=["AdamW", "SGD"],
)
def test_the_constructors_hand_the_wrappers_options_on(cls: Any, options: dict[str, Any], inner: Any) -> None:
    wanted = {n for n, p in inspect.signature(SDSPreconditioner).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert wanted <= set(inspect.signature(cls).parameters)
    model, other = Network(), Network()
    sdsopt.link(model)
    between = {"transport": "moments", "rebalance_every": 2}
    train(model, cls(model.parameters(), lr=0.01, **options, **between), 4)
    train(other, SDSPreconditioner(inner(other.parameters()), other, **between), 4)
    assert_same(model, other)


def test_moments_cannot_follow_factors_that_two_optimizers_train() -> None:
    model = Network()
    halves = [[p for name, p in model.named_parameters() if letter in name] for letter in ("lora_A", "lora_B")]
    before = copy.deepcopy(model)
    for half in halves:
        optimizer = SDSPreconditioner(AdamW(half, lr=0.01), model, transport="moments")
        model.loss().backward()
        with pytest.raises(UnsupportedCorrectionError, match="another one the other"):
            optimizer.step()
    assert_same(model, before)
    for parameter in halves[1]:
        parameter.requires_grad_(False)  # a frozen partner moves nowhere
    optimizer = SDSPreconditioner(AdamW(halves[0], lr=0.01), model, transport="moments")
    optimizer.step()
    assert differs(model, before)
