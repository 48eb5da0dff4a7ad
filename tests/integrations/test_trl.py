"""TRL's trainers, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

from hf_runs import (
    RATE,
    Plug,
    Weights,
    adapted,
    all_differ,
    arguments,
    as_callback,
    as_factory,
    as_optimizer,
    bare,
    by_hand,
    same,
    trainable,
    weights,
)
from sdsopt import SDSPreconditioner

trl = pytest.importorskip("trl", exc_type=ImportError)
datasets = pytest.importorskip("datasets", exc_type=ImportError)
trl_sft = pytest.importorskip("trl_sft", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*torch_dtype.*", "ignore:.*pin_memory.*"
)


def sft(plug: Plug, folder: Path, precision: str) -> Any:
    args = arguments(folder, trl.SFTConfig, bf16=precision == "bf16")
    model = adapted()
    return trl.SFTTrainer(
        model,
        args,
        train_dataset=trl_sft.build_data(),
        processing_class=trl_sft.build_tokenizer(),
        **plug(model, args),
    )


RUNS = [
    (as_optimizer, "optimizer", "fp32"),
    (as_factory, "optimizer", "bf16"),  # TRL's default
    (as_callback, "backward", "bf16"),
]


@pytest.mark.parametrize(("plug", "place", "precision"), RUNS)
def sft_by_hand(place: str, folder: Path, precision: str) -> Weights:
    """With TRL's own loss, which comes from a head that it fuses into the model."""
    run = sft(bare, folder, precision)
    return by_hand(
        place,
        model=run.model,
        batches=run.get_train_dataloader(),
        loss_of=lambda model, batch, tokens: run.compute_loss(model, batch, num_items_in_batch=tokens),
        precision=precision,
    )


@pytest.mark.parametrize(("plug", "place", "precision"), RUNS)
def test_sft_equals_the_loop_by_hand_and_resumes(plug: Plug, place: str, precision: str, tmp_path: Path) -> None:
    run = sft(plug, tmp_path, precision)
    run.train()
    whole = weights(run.model)
    assert same(whole, sft_by_hand(place, tmp_path, precision))
    assert all_differ(whole, sft_by_hand("nowhere", tmp_path, precision))

    resumed = sft(plug, tmp_path, precision)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(whole, weights(resumed.model))


def test_dpo_takes_a_finished_optimizer(tmp_path: Path) -> None:
    """Its trainers for preferences and rewards of answers have no `optimizer_cls_and_kwargs`."""
    data = datasets.Dataset.from_list([{"prompt": "one two", "chosen": " three four", "rejected": " nine"}] * 24)

    def trained(place: str, resume: bool = False) -> Any:
        model = adapted()
        optimizer: Any = AdamW(trainable(model), lr=RATE)
        if place == "optimizer":
            optimizer = SDSPreconditioner(optimizer, model)
        args = arguments(tmp_path / place, trl.DPOConfig, bf16=False)
        run = trl.DPOTrainer(
            model,
            args=args,
            train_dataset=data,
            processing_class=trl_sft.build_tokenizer(),
            optimizers=(optimizer, None),
        )
        run.train(resume_from_checkpoint=str(tmp_path / place / "checkpoint-3") if resume else None)
        return weights(run.model)

    whole = trained("optimizer")
    assert all_differ(whole, trained("nowhere"))
    assert same(whole, trained("optimizer", resume=True))
