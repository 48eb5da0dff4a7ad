"""`max_grad_norm`: clipping after the correction."""

from __future__ import annotations

import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW

from recorder import Recorder, corrected_gradients
from sdsopt import SDSPreconditioner, attach, available_corrections
from toy import Network, assert_same, train


def norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([gradient.norm() for gradient in gradients]).norm()


@pytest.mark.parametrize("correction", available_corrections())
@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_corrected_gradients_are_clipped_together(correction: str, limit: float) -> None:
    model = Network(dtype=torch.float64)
    model.loss().backward()
    raw = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    free = corrected_gradients(model, correction)
    recorder = Recorder(model.parameters())
    SDSPreconditioner(recorder, model, correction, max_grad_norm=limit).step()
    total = norm(list(free.values()))
    factor = min(1.0, limit / (total.item() + 1e-6))
    assert recorder.seen.keys() == free.keys() >= {model.first.B, model.second.B, *model.head.parameters()}
    for parameter, seen in recorder.seen.items():
        torch.testing.assert_close(seen, free[parameter] * factor)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, raw[parameter])  # the raw gradient is back


def test_it_equals_hooks_with_the_trainers_clipping() -> None:
    hooked, wrapped = Network(dtype=torch.float64), Network(dtype=torch.float64)
    optimizer = SGD(hooked.parameters(), lr=0.1)
    with attach(hooked):
        for step in range(5):
            hooked.zero_grad()
            hooked.loss(step).backward()
            clip_grad_norm_(hooked.parameters(), 0.3)
            optimizer.step()
    train(wrapped, SDSPreconditioner(SGD(wrapped.parameters(), lr=0.1), wrapped, max_grad_norm=0.3), steps=5)
    for one, other in zip(hooked.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_clipping_before_the_correction_is_something_else() -> None:
    """What the docs say: the wrapper sees gradients that were clipped raw."""
    before, after = Network(), Network()
    train(after, SDSPreconditioner(SGD(after.parameters(), lr=0.1), after, max_grad_norm=0.3), steps=1)
    optimizer = SDSPreconditioner(SGD(before.parameters(), lr=0.1), before)
    before.loss().backward()
    clip_grad_norm_(before.parameters(), 0.3)
    optimizer.step()
    assert not torch.allclose(before.first.B, after.first.B)


def test_a_limit_out_of_reach_changes_nothing() -> None:
    free, limited = Network(), Network()
    train(free, SDSPreconditioner(AdamW(free.parameters()), free, "sds-split"))
    train(limited, SDSPreconditioner(AdamW(limited.parameters()), limited, "sds-split", max_grad_norm=1e9))
    assert_same(free, limited)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_that_make_no_sense(limit: float) -> None:
    model = Network()
    with pytest.raises(ValueError, match="max_grad_norm must be a positive number"):
        SDSPreconditioner(SGD(model.parameters(), lr=0.1), model, max_grad_norm=limit)
