"""The examples with Hugging Face's libraries: they learn, the correction acts, and what resumes ends the same."""

from __future__ import annotations

import pytest
import torch

from hf_runs import reset_accelerate

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*pin_memory.*")


@pytest.mark.parametrize("in_backward", [False, True])
def test_hf_trainer(in_backward: bool) -> None:
    pytest.importorskip("datasets", exc_type=ImportError)
    import hf_trainer

    losses = hf_trainer.main("sds", in_backward=in_backward, steps=20)
    assert losses[-1] < 0.95 * losses[0]
    assert losses != hf_trainer.main("lora", in_backward=in_backward, steps=20)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate_loop(mixed_precision: str) -> None:
    import accelerate_loop

    reset_accelerate()
    loss, resumed = accelerate_loop.main("sds", epochs=2, mixed_precision=mixed_precision)
    assert torch.equal(loss, resumed)
    plain, _ = accelerate_loop.main("lora", epochs=2, mixed_precision=mixed_precision)
    assert loss != plain


def test_trl_sft() -> None:
    pytest.importorskip("trl", exc_type=ImportError)
    import trl_sft

    losses = trl_sft.main("sds", steps=20)
    assert losses[-1] < 0.9 * losses[0]
    assert losses != trl_sft.main("lora", steps=20)
