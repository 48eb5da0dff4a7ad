"""Hugging Face's Trainer, end to end: each run equals the loop written by hand, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from documented import blocks, execute
from hf_runs import (
    RATE,
    Plug,
    Tokens,
    adapted,
    all_differ,
    arguments,
    as_callback,
    as_class,
    as_factory,
    as_optimizer,
    bare,
    by_hand,
    fresh_accelerator,
    same,
    set_up_fp16,
    trainable,
    trained,
    trainer,
    weights,
)
from sdsopt import Recorder, SDSPreconditioner
from sdsopt.integrations.transformers import SDSOptimizerFactory

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PLACES = [(as_optimizer, "optimizer"), (as_factory, "optimizer"), (as_class, "optimizer"), (as_callback, "backward")]


class HalfOnCPU(transformers.Trainer):
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        set_up_fp16(self.accelerator)


TRAINERS = {"fp32": transformers.Trainer, "bf16": transformers.Trainer, "fp16": HalfOnCPU}


@pytest.mark.parametrize("precision", TRAINERS)
@pytest.mark.parametrize(("plug", "place"), PLACES)
def test_it_equals_the_loop_by_hand_and_resumes(plug: Plug, place: str, precision: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {} if precision == "fp32" else {precision: True}
    options["cls"] = TRAINERS[precision]
    whole = trained(plug, tmp_path, **options)
    assert same(whole, by_hand(place, precision=precision))
    assert all_differ(whole, by_hand("nowhere", precision=precision))
    assert same(whole, trained(plug, tmp_path, resume=tmp_path / "checkpoint-3", **options))


def test_a_scaler_skips_overflown_steps_of_the_wrapper(tmp_path: Path) -> None:
    run = trainer(as_factory, arguments(tmp_path, fp16=True), HalfOnCPU)
    steps: list[tuple[bool, bool]] = []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.before = weights(run.model)  # pyright: ignore

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            assert run.accelerator is not None
            steps.append((run.accelerator.optimizer_step_was_skipped, same(self.before, weights(run.model))))  # pyright: ignore

    run.add_callback(Watch())
    run.train()
    assert [skipped for skipped, _ in steps] == [unchanged for _, unchanged in steps]
    assert {skipped for skipped, _ in steps} == {True, False}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Accelerate sets up fp16 and its scaler on a GPU only")
def test_fp16_on_a_gpu(tmp_path: Path) -> None:
    options: dict[str, Any] = {"fp16": True, "use_cpu": False}
    whole = trained(as_factory, tmp_path, **options)
    assert all_differ(whole, trained(bare, tmp_path / "bare", **options))
    assert same(whole, trained(as_factory, tmp_path, tmp_path / "checkpoint-3", **options))


@pytest.mark.parametrize(("plug", "place"), [(as_factory, "optimizer"), (as_callback, "backward")])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_gradient_checkpointing(
    plug: Plug, place: str, accumulation: int, checkpointing: bool, tmp_path: Path
) -> None:
    found = trained(
        plug,
        tmp_path,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=checkpointing,
        max_grad_norm=0.0,
        save_strategy="no",
    )
    assert same(found, by_hand(place, accumulation=accumulation, max_grad_norm=0.0))


def test_the_trainers_clipping_sees_raw_or_corrected_gradients(tmp_path: Path) -> None:
    """Without clipping wrapper and hooks agree; the wrapper's own clipping is the one that hooks get of the Trainer."""

    def wrapped(max_grad_norm: float) -> Plug:
        def plug(model: Any, args: transformers.TrainingArguments) -> dict[str, Any]:
            options = {"training_args": args, "max_grad_norm": max_grad_norm}
            return {"optimizer_cls_and_kwargs": (SDSOptimizerFactory, options)}

        return plug

    def run(plug: Plug, max_grad_norm: float) -> dict[str, torch.Tensor]:
        # SGD, since Adam hides the gradients' length.
        return trained(plug, tmp_path, optim="sgd", save_strategy="no", max_grad_norm=max_grad_norm)

    free = run(as_factory, 0.0)
    clipped_raw = run(as_factory, 0.1)
    clipped_corrected = run(as_callback, 0.1)
    close = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(run(as_callback, 0.0), free, **close)
    torch.testing.assert_close(run(wrapped(0.1), 0.0), clipped_corrected, **close)
    assert all_differ(free, clipped_raw)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(clipped_raw, clipped_corrected, **close)


@pytest.mark.parametrize("plug", [as_factory, as_class])
def test_a_bare_checkpoint_goes_on_corrected_and_back(plug: Plug, tmp_path: Path) -> None:
    plain = trained(bare, tmp_path / "bare")
    retrofitted = trained(plug, tmp_path, tmp_path / "bare" / "checkpoint-3")
    assert same(retrofitted, by_hand("optimizer", corrected=range(3, 6)))
    assert all_differ(retrofitted, plain)

    trained(plug, tmp_path / "sds")
    back = trained(bare, tmp_path, tmp_path / "sds" / "checkpoint-3")
    assert same(back, by_hand("optimizer", corrected=range(3)))


@pytest.mark.parametrize("correction", ["sds-split", "scaled"])
def test_other_corrections_resume_too(correction: str, tmp_path: Path) -> None:
    def plug(model: Any, args: transformers.TrainingArguments) -> dict[str, Any]:
        return {
            "optimizer_cls_and_kwargs": (SDSOptimizerFactory, {"training_args": args, "correction": correction}),
        }

    whole = trained(plug, tmp_path)
    assert all_differ(whole, by_hand("nowhere"))
    assert all_differ(whole, by_hand("optimizer"))
    assert same(whole, trained(plug, tmp_path, tmp_path / "checkpoint-3"))


def test_the_loop_by_hand_without_correction_is_the_bare_trainer(tmp_path: Path) -> None:
    assert same(trained(bare, tmp_path), by_hand("nowhere"))


@pytest.mark.parametrize(("plug", "place"), [(bare, "nowhere"), (as_factory, "optimizer")])
def test_the_documented_recording(plug: Plug, place: str, tmp_path: Path) -> None:
    """It sees raw gradients, whichever optimizer steps, and changes nothing."""
    run = trainer(plug, arguments(tmp_path, save_strategy="no"))
    [code] = blocks("docs/use-with/huggingface.md", "## Measure")
    history = execute(code.replace("every=20", "every=2"), "huggingface.md", trainer=run)["recorder"].history
    assert same(weights(run.model), by_hand(place))  # pyright: ignore
    assert [measurement.step for measurement in history] == [0, 2, 4]
    for measurement in history:
        assert len(measurement.pairs) == 14
        steps = [pair.steps for name, pair in measurement.pairs.items() if "q_proj" in name]
        assert len(steps) == 2
        assert all(0 < (found["lora"].alignment or 0) < (found["scaled"].alignment or 0) for found in steps)


def test_recording_through_accelerates_optimizer() -> None:
    accelerator = fresh_accelerator("fp32", accumulation=2)
    model = adapted()
    loader: Any = torch.utils.data.DataLoader(Tokens(), batch_size=2)
    wrapped = SDSPreconditioner(torch.optim.AdamW(trainable(model), lr=RATE), model)
    model, optimizer, loader = accelerator.prepare(model, wrapped, loader)
    with Recorder(model, optimizer, full_gradients="q_proj") as recorder:
        for _, batch in zip(range(6), loader, strict=False):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                expected = wrapped.diagnostics()
                optimizer.step()
                optimizer.zero_grad()
    assert [measurement.step for measurement in recorder.history] == [0, 1, 2]
    for name, pair in recorder.history[-1].pairs.items():
        assert pair.steps["lora"].effective_rank_A == expected[name].steps["lora"].effective_rank_A
        assert pair.steps["sds"].effective_rank_B == expected[name].steps["corrected"].effective_rank_B
