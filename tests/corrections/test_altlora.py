"""AltLoRA against its definition: least squares against the full gradient and the full momentum, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from recorder import corrected_gradients
from sdsopt import AltLoRA, SDSPreconditioner
from toy import LoRALinear, lora_linear

ROWS, COLUMNS, RANK, S, BETA = 9, 7, 3, 0.7, 0.9


def start() -> LoRALinear:
    return lora_linear(ROWS, COLUMNS, RANK, condition=6.0, scaling=S, dtype=torch.float64)


def full_gradient(A: Tensor, B: Tensor, step: int) -> Tensor:
    """Of a quadratic loss in W, so that it depends on where the other factor has gone."""
    target = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return S * B @ A - target


def best_A(B: Tensor, wanted: Tensor) -> Tensor:
    """argmin over X of ‖s·B·X − wanted‖."""
    return torch.linalg.lstsq(S * B, wanted).solution


def best_B(A: Tensor, wanted: Tensor) -> Tensor:
    return torch.linalg.lstsq(S * A.T, wanted.T).solution.T


def paper(rates: list[float], every: int = 1, project: bool = True) -> tuple[Tensor, Tensor]:
    """Algorithm 1, with momentum as an average, one factor a step, B first."""
    model = start()
    A, B = model.A.detach().clone(), model.B.detach().clone()
    M_A = M_B = None
    for step, rate in enumerate(rates):
        G = full_gradient(A, B, step)
        if step // every % 2 == 0:
            g, old = best_B(A, G), B
            M_B = g if M_B is None else BETA * M_B + (1 - BETA) * g
            B = B - rate * M_B
            if M_A is not None and project:
                M_A = best_A(B, S * old @ M_A)  # what of the old momentum, seen in W, the new subspace can hold
        else:
            g, old = best_A(B, G), A
            M_A = g if M_A is None else BETA * M_A + (1 - BETA) * g
            A = A - rate * M_A
            if M_B is not None and project:
                M_B = best_B(A, S * M_B @ old)
    return A, B


def sgd(parameters: Iterable[Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=BETA, dampening=BETA)


def run(correction: str | AltLoRA, schedule: Callable[[int], float], steps: int) -> LoRALinear:
    model = start()
    optimizer = SDSPreconditioner(sgd(model.parameters()), model, correction, damping=0.0)
    scheduler = LambdaLR(optimizer, schedule)
    for step in range(steps):
        model.backward_from(full_gradient(model.A.detach(), model.B.detach(), step))
        optimizer.step()
        scheduler.step()
    return model


def constant(step: int) -> float:
    return 1.0


def decaying(step: int) -> float:
    return 0.7**step


@pytest.mark.parametrize(
    ("correction", "every", "project"),
    [("altlora", 1, True), (AltLoRA(every=2), 2, True), (AltLoRA(project_momentum=False), 1, False)],
)
@pytest.mark.parametrize("schedule", [constant, decaying])
def test_it_is_the_papers_algorithm(
    schedule: Callable[[int], float], correction: str | AltLoRA, every: int, project: bool
) -> None:
    """Under a schedule too: the published code keeps the learning rate that it was built with."""
    model = run(correction, schedule, steps=7)
    A, B = paper([0.1 * schedule(step) for step in range(7)], every, project)
    torch.testing.assert_close(model.A.detach(), A, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.B.detach(), B, rtol=1e-9, atol=1e-10)


def test_schedule_and_projection_each_make_a_difference() -> None:
    found = [run("altlora", schedule, 7).A for schedule in (constant, decaying)]
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert (run(AltLoRA(project_momentum=False), constant, 7).A - found[0]).abs().max() > 1e-4


def test_the_factor_that_waits_is_left_alone() -> None:
    """Its weight decay, its moments and its count of steps too."""
    model = start()
    inner = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    optimizer = SDSPreconditioner(inner, model, "altlora")
    order: list[str] = []
    for step in range(4):
        A, B = model.A.detach().clone(), model.B.detach().clone()
        model.backward_from(full_gradient(A, B, step))
        raw = model.A.grad, model.B.grad
        optimizer.step()
        assert (model.A.grad, model.B.grad) == raw  # both are back
        moved = [name for name, p, old in (("A", model.A, A), ("B", model.B, B)) if not torch.equal(p, old)]
        order += moved
    assert order == ["B", "A", "B", "A"]
    assert {float(inner.state[p]["step"]) for p in (model.A, model.B)} == {2.0}


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_with_one_factor_frozen_the_other_steps_each_time(frozen: str) -> None:
    model = start()
    still, other = (model.A, model.B) if frozen == "A" else (model.B, model.A)
    still.requires_grad_(False)
    optimizer = SDSPreconditioner(sgd([other]), model, "altlora")
    for step in range(3):
        before = other.detach().clone()
        model.backward_from(full_gradient(model.A.detach(), model.B.detach(), step))
        still.grad = None
        optimizer.step()
        assert not torch.equal(other, before)


def test_from_B_equal_to_zero_B_goes_first() -> None:
    model = start()
    with torch.no_grad():
        model.B.zero_()
    optimizer = SDSPreconditioner(AdamW(model.parameters(), lr=0.01), model, "altlora")
    for step in range(4):
        model.backward_from(full_gradient(model.A.detach(), model.B.detach(), step))
        optimizer.step()
        assert model.B.any()
        assert all(p.isfinite().all() for p in model.parameters())


def test_what_the_inner_optimizer_is_given() -> None:
    model = start()
    model.backward_from(full_gradient(model.A.detach(), model.B.detach(), 0))
    assert set(corrected_gradients(model, "altlora")) == {model.B}


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="every must be a number of steps"):
        AltLoRA(every=0)
