"""The family's members and its start policy."""

from __future__ import annotations

import pytest
import torch

from recorder import corrected_gradients
from sdsopt import Correction, GramPower, KeepNorm, SDSPreconditioner, available_corrections, register_correction
from sdsopt.corrections import make_correction
from sdsopt.errors import UnknownCorrectionError
from toy import LoRALinear, lora_linear


def test_the_names() -> None:
    assert available_corrections()[:4] == ("lora", "sds", "sds-split", "scaled")
    assert make_correction("lora") == GramPower(0.0)
    assert make_correction("sds") == GramPower(0.5)
    assert make_correction("sds-split") == GramPower(0.5, update_exponent=0.5)
    assert make_correction("scaled") == GramPower(1.0)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownCorrectionError, match=r"'sdss'.*lora, sds, sds-split, scaled"):
        make_correction("sdss")
    with pytest.raises(TypeError, match="name or a Correction"):
        make_correction(0.5)  # pyright: ignore


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdsopt.corrections.registry._FACTORIES", {"sds": lambda: GramPower(0.5)})

    def quarter() -> Correction:
        return GramPower(0.25)

    register_correction("quarter", quarter)
    register_correction("quarter", quarter)  # a module that is imported twice
    assert make_correction("quarter") == GramPower(0.25)
    assert available_corrections() == ("sds", "quarter")
    with pytest.raises(ValueError, match="'quarter' is already registered"):
        register_correction("quarter", lambda: GramPower(0.5))
    with pytest.raises(TypeError, match=r"'half' needs a factory.*GramPower is not callable; register the class"):
        register_correction("half", GramPower(0.5))  # pyright: ignore
    assert available_corrections() == ("sds", "quarter")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent": -0.1}, "exponent must be between 0"),
        ({"exponent": 1.1}, "exponent must be between 0"),
        ({"exponent": float("nan")}, "exponent must be between 0"),
        ({"exponent": 0.5, "update_exponent": 2.0}, "update_exponent must be between"),
        ({"exponent": 0.5, "max_update_ratio": 0.0}, "max_update_ratio must be positive"),
    ],
)
def test_bad_settings(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GramPower(**arguments)


def from_zero_B() -> LoRALinear:
    """LoRA's usual start: A random, B = 0."""
    model = lora_linear(14, 11, 4, dtype=torch.float64)
    return LoRALinear(model.A.detach(), torch.zeros(14, 4, dtype=torch.float64), 2.0)


def largest_move_of_A(correction: Correction, steps: int = 5, lr: float = 1e-3) -> float:
    """The largest ‖δA‖/max(‖A‖, ‖B‖) of the first steps with AdamW from B = 0."""
    model = from_zero_B()
    target = torch.randn(14, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    inner = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    optimizer = SDSPreconditioner(inner, model, correction)
    moves: list[float] = []
    for _ in range(steps):
        A, larger = model.A.detach().clone(), max(model.A.norm().item(), model.B.norm().item())
        model.backward_from(model.delta - target)
        optimizer.step()
        moves.append((model.A.detach() - A).norm().item() / larger)
    assert model.B.norm() > 0
    return max(moves)


def test_the_start_policy_of_the_split_form_bounds_the_steps() -> None:
    assert largest_move_of_A(make_correction("sds-split")) <= 0.1 * (1 + 1e-9)
    assert largest_move_of_A(GramPower(0.5, 0.5, max_update_ratio=0.01)) <= 0.01 * (1 + 1e-9)


def test_without_the_start_policy_the_steps_are_huge() -> None:
    assert largest_move_of_A(GramPower(0.5, 0.5, max_update_ratio=None)) > 0.3


def test_the_start_policy_is_idle_later() -> None:
    """Away from B = 0 and at a usual learning rate, the policy changes nothing."""
    results: list[torch.Tensor] = []
    for ratio in (0.1, None):
        model = lora_linear(14, 11, 4, dtype=torch.float64)
        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = SDSPreconditioner(inner, model, GramPower(0.5, 0.5, max_update_ratio=ratio))
        model.backward_from(model.delta + 1)
        optimizer.step()
        results.append(model.delta)
    assert torch.equal(*results)


def test_two_zero_factors_may_leave_zero() -> None:
    """There is no length to measure by: the step is taken as it is."""
    model = LoRALinear(torch.zeros(2, 5), torch.zeros(4, 2))
    optimizer = SDSPreconditioner(torch.optim.SGD(model.parameters(), lr=1.0), model, "sds-split")
    model.A.grad, model.B.grad = torch.ones(2, 5), torch.ones(4, 2)
    optimizer.step()
    assert torch.equal(model.A.detach(), -torch.ones(2, 5))
    assert torch.equal(model.B.detach(), -torch.ones(4, 2))


@pytest.mark.parametrize("correction", available_corrections())
def test_grad_norm_keeps_every_norm(correction: str) -> None:
    model = lora_linear(14, 11, 4, condition=50.0)
    model.backward_from(torch.randn(14, 11, generator=torch.Generator().manual_seed(1)))
    raw = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    plain = corrected_gradients(model, correction)
    seen = corrected_gradients(model, correction, rescale="grad_norm")
    assert model.B in plain
    for parameter in plain:
        torch.testing.assert_close(seen[parameter].norm(), raw[parameter].norm())
        direction, wanted = (g / g.norm() for g in (seen[parameter], plain[parameter]))
        torch.testing.assert_close(direction, wanted)


def test_grad_norm_keeps_the_inner_steps_length_in_the_split_form() -> None:
    model = lora_linear(14, 11, 4, condition=50.0, dtype=torch.float64)
    before = model.A.detach().clone()
    optimizer = SDSPreconditioner(torch.optim.SGD(model.parameters(), lr=0.1), model, "sds-split", rescale="grad_norm")
    assert optimizer.correction == KeepNorm(GramPower(0.5, 0.5))
    model.backward_from(torch.randn(14, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    assert model.A.grad is not None
    optimizer.step()
    torch.testing.assert_close((model.A.detach() - before).norm(), 0.1 * model.A.grad.norm())


def test_grad_norm_leaves_a_zero_gradient_zero() -> None:
    model = from_zero_B()
    model.backward_from(torch.ones(14, 11, dtype=torch.float64))
    seen = corrected_gradients(model, "sds", rescale="grad_norm")
    assert torch.equal(seen[model.A], torch.zeros_like(model.A))
    assert seen[model.B].isfinite().all()
