"""The example: a checkpoint of bare AdamW goes on under the correction, with its own moments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import continue_checkpoint
from sdsopt import SDSPreconditioner
from sdsopt.integrations.transformers import SDSCallback


class WithCallback(continue_checkpoint.Trainer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.add_callback(SDSCallback())


pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")


def weights(trainer: continue_checkpoint.Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}  # pyright: ignore


def test_a_checkpoint_of_bare_adamw_goes_on_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[dict[str, Any]] = []
    load = SDSPreconditioner.load_state_dict

    def spy(self: SDSPreconditioner, state_dict: dict[str, Any]) -> None:
        load(self, state_dict)
        loaded.append(copy.deepcopy(self.state_dict()))

    monkeypatch.setattr(SDSPreconditioner, "load_state_dict", spy)
    steps = 12
    bare, corrected = continue_checkpoint.main(tmp_path, steps)
    out = capsys.readouterr().out
    assert "for SDS to undo" in out and "corrected from half-way" in out

    # The old moments are what training went on from ...
    checkpoint = tmp_path / "bare" / f"checkpoint-{steps // 2}"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    state = loaded[-1]["state"]
    assert state.keys() == saved.keys() and len(saved) == 28
    for index, entry in saved.items():
        assert all(torch.equal(entry[key], state[index][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    # ... and it went on to the end, by corrected steps.
    assert isinstance(corrected.optimizer.optimizer, SDSPreconditioner)  # pyright: ignore
    assert corrected.state.global_step == bare.state.global_step == steps
    # Resuming alone changes nothing, so that the difference is the correction's.
    again = continue_checkpoint.train(continue_checkpoint.Trainer, tmp_path / "again", steps, resume=checkpoint)
    assert all(torch.equal(weights(again)[name], weight) for name, weight in weights(bare).items())
    by_hooks = continue_checkpoint.train(WithCallback, tmp_path / "hooks", steps, resume=checkpoint)
    for other in (corrected, by_hooks):
        assert not any(torch.equal(weights(other)[name], weight) for name, weight in weights(bare).items())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (bare, corrected)]
    assert losses[0][0] == losses[1][0]  # the first half is the checkpoint's
    assert losses[1][1] < losses[1][0]
