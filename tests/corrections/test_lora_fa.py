"""LoRA-FA against its formula and PEFT's optimizer, and what the engine does with a factor that shall not step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, lorafa
from torch import Tensor, nn

import oracle
from recorder import corrected_gradients
from sdsopt import Correction, Factors, LearningRates, PairTensors, SDSPreconditioner, attach
from sdsopt.corrections import basis_change
from sdsopt.errors import UnsupportedCorrectionError
from toy import LoRALinear, Network, lora_linear, train


@pytest.mark.parametrize("condition", [2.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 128])
def test_the_formula(rank: int, dtype: torch.dtype, condition: float) -> None:
    model = lora_linear(150, 140, rank, condition=condition, scaling=2.0, dtype=dtype)
    model.backward_from(torch.randn(150, 140, dtype=torch.float64, generator=torch.Generator().manual_seed(7)))
    assert model.B.grad is not None
    seen = corrected_gradients(model, "lora-fa")
    expected = model.B.grad.double() @ oracle.inverse_root(model.A.detach().T, 1, 1e-6) / 4
    assert seen.keys() == {model.B}
    assert oracle.relative_error(seen[model.B], expected) < torch.finfo(dtype).eps + 1e-8


def adapted() -> peft.PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4))
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"])
        return peft.get_peft_model(base, config)  # pyright: ignore


def test_it_is_pefts_optimizer_around_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    # PEFT's own rounds the gradients to bfloat16 otherwise.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs, ours = adapted(), adapted()
    their_optimizer = create_lorafa_optimizer(theirs, r=3, lora_alpha=6, lr=0.01)
    # It adds ε before the bias correction, and torch after it.
    their_optimizer.param_groups[0]["eps"] = 0.0
    inner = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01, eps=0.0, weight_decay=0.0)
    our_optimizer = SDSPreconditioner(inner, ours, "lora-fa", damping=1e-8)
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    x, y = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(1)).unbind()
    for _ in range(20):
        for model, optimizer in ((theirs, their_optimizer), (ours, our_optimizer)):
            optimizer.zero_grad()
            (model(x) - y[:, :4]).square().mean().backward()
            optimizer.step()
    moved = 0
    for (name, one), other in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6, msg=name)
        moved += not torch.equal(other, start[name])
        assert "lora_B" in name or torch.equal(other, start[name])
    assert moved == 2


@pytest.mark.parametrize("option", [{"transport": "moments"}, {"rebalance_every": 2}], ids=str)
def test_there_is_nothing_to_carry_and_nothing_to_balance(option: dict[str, Any]) -> None:
    """A rests, so the basis of B's moments does, and carrying them would not change a bit; balancing would move A."""
    model = lora_linear(dtype=torch.float64)
    with pytest.raises(UnsupportedCorrectionError, match="basis_exponent is None"):
        SDSPreconditioner(torch.optim.AdamW(model.parameters()), model, "lora-fa", **option)
    assert torch.equal(_change_of_B(model, model.B.detach() + 1), torch.eye(4, dtype=torch.float64))


def _change_of_B(model: LoRALinear, new_B: Tensor) -> Tensor:
    root = {1.0: oracle.inverse_root(model.A.detach().T, 1.0, 1e-6)[None]}
    old, new = (Factors(model.A.detach()[None], B[None], 1.0, torch.float64, root, root) for B in (model.B, new_B))
    return basis_change(old, new, 1.0)[1][0]


@pytest.mark.parametrize("frozen", [False, True])
def test_A_makes_no_step_at_all(frozen: bool) -> None:
    """No weight decay, no state, no count; and its raw gradient is back afterwards."""
    model = Network()
    model.first.A.requires_grad_(not frozen)
    before = model.first.A.detach().clone()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    train(model, SDSPreconditioner(inner, model, "lora-fa", max_grad_norm=1.0), 3)
    assert torch.equal(model.first.A, before)
    assert model.first.A not in inner.state and model.first.B in inner.state
    model.zero_grad()
    model.loss(2).backward()
    assert (model.first.A.grad is None) == frozen


def test_freezing_A_oneself_is_the_same_training() -> None:
    free, frozen = Network(), Network()
    for layer in (frozen.first, frozen.second):
        layer.A.requires_grad_(False)
    for model in (free, frozen):
        train(model, SDSPreconditioner(torch.optim.AdamW(model.parameters(), lr=0.1), model, "lora-fa"), 3)
    for one, other in zip(free.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_raw_gradient_comes_back() -> None:
    model = lora_linear()
    model.backward_from(torch.ones(12, 10))
    raw = model.A.grad
    corrected_gradients(model, "lora-fa")
    assert model.A.grad is raw


def test_grad_norm_rescaling_works_with_it() -> None:
    model = lora_linear(scaling=3.0)
    model.backward_from(torch.randn(12, 10, generator=torch.Generator().manual_seed(1)))
    assert model.B.grad is not None
    seen = corrected_gradients(model, "lora-fa", rescale="grad_norm")
    assert seen.keys() == {model.B}
    torch.testing.assert_close(seen[model.B].norm(), model.B.grad.norm())


@dataclass(frozen=True)
class OnlyB(Correction):
    """Leaves A out and doubles B's step."""

    linear: bool = False

    @property
    def uses_updates(self) -> bool:
        return not self.linear

    @property
    def linear_per_factor(self) -> bool:
        return self.linear

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        return gradients._replace(A=None)

    def postcondition(self, factors: Factors, updates: PairTensors, rates: LearningRates) -> PairTensors:
        assert updates.A is None and rates.A is None
        assert rates.B == 0.1
        return updates.map(lambda update: 2 * update)


def test_a_factor_left_out_is_left_out_of_the_update_map_too() -> None:
    """Though its group has weight decay, which it never took part in."""
    model, bare = lora_linear(), lora_linear()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5) for m in (model, bare)]
    for m, optimizer in zip(
        (model, bare), (SDSPreconditioner(optimizers[0], model, OnlyB()), optimizers[1]), strict=True
    ):
        m.backward_from(torch.ones(12, 10))
        optimizer.step()
    start = lora_linear()
    assert torch.equal(model.A, start.A)
    decayed = start.B * (1 - 0.05)
    torch.testing.assert_close(model.B - decayed, 2 * (bare.B - decayed))


def test_hooks_cannot_leave_a_factor_out() -> None:
    model = lora_linear()
    with pytest.raises(UnsupportedCorrectionError, match="keeps a factor from stepping"):
        attach(model, "lora-fa")
    assert not model.A._backward_hooks
    with attach(model, OnlyB(linear=True)), pytest.raises(UnsupportedCorrectionError, match=r"factor A of \[default\]"):
        model(torch.ones(1, 10)).sum().backward()
