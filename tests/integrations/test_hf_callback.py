"""The callback: hooks for the time of a training, and condition numbers in its logs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import integration_utils

import sdsopt
from hf_runs import (
    adapted,
    all_differ,
    arguments,
    as_callback,
    as_factory,
    bare,
    by_hand,
    same,
    trained,
    trainer,
    weights,
)
from sdsopt import find_pairs
from sdsopt.errors import DoubleCorrectionError, NoPairsError, UnsupportedCorrectionError
from sdsopt.integrations.transformers import SDSCallback

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONDITIONS = {"sds/condition_A", "sds/condition_B"}


class Logger(transformers.TrainerCallback):
    """Keeps what it is sent, as TensorBoard's and W&B's callbacks do, and how many factors had hooks then."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> Logger:
    """A logger that `report_to="kept"` names."""
    logger = Logger()
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "kept", logger)  # pyright: ignore
    return logger


def logged(logger: Logger) -> list[set[str]]:
    return [CONDITIONS & log.keys() for log in logger.logs if "loss" in log]


def logging_arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    return arguments(folder, logging_steps=2, save_strategy="no", report_to=["kept"], **options)


def hooked(model: Any) -> int:
    """The number of tensor hooks."""
    return sum(len(p._backward_hooks or ()) for p in model.parameters())


def test_condition_numbers_reach_loggers_before_and_behind_it(tmp_path: Path, reported: Logger) -> None:
    """`add_to` puts the callback before the loggers of `report_to`."""
    run = trainer(bare, logging_arguments(tmp_path))
    SDSCallback().add_to(run)
    run.train()
    assert logged(reported) == [CONDITIONS] * 3
    assert all(entry.keys() >= CONDITIONS for entry in run.state.log_history if "loss" in entry)


def test_in_a_list_it_reaches_those_behind_it(tmp_path: Path, reported: Logger) -> None:
    """And the Trainer's history, but not the loggers of `report_to`, which come first."""
    behind = Logger()
    args = logging_arguments(tmp_path)
    run = trainer(lambda model, args: {"callbacks": [SDSCallback(), behind]}, args)
    run.train()
    assert logged(reported) == [set()] * 3
    assert logged(behind) == [CONDITIONS] * 3
    assert [entry.keys() >= CONDITIONS for entry in run.state.log_history] == [True] * 3 + [False]


def test_one_from_the_list_can_be_moved_to_the_front(tmp_path: Path, reported: Logger) -> None:
    callback = SDSCallback()
    run = trainer(lambda model, args: {"callbacks": [callback]}, logging_arguments(tmp_path))
    assert callback.add_to(run) is callback
    assert run.callback_handler.callbacks.count(callback) == 1
    run.train()
    assert logged(reported) == [CONDITIONS] * 3


def test_the_numbers_are_those_of_the_factors(tmp_path: Path, reported: Logger) -> None:
    run = trainer(bare, logging_arguments(tmp_path))
    SDSCallback().add_to(run)
    run.train()
    pairs = find_pairs(run.model)  # pyright: ignore
    last = [log for log in reported.logs if "loss" in log][-1]
    for side in "AB":
        expected = median(torch.linalg.cond(getattr(pair, side).detach().double()).item() for pair in pairs)
        assert last[f"sds/condition_{side}"] == pytest.approx(expected, rel=1e-9)


def test_they_can_be_left_out(tmp_path: Path, reported: Logger) -> None:
    run = trainer(bare, logging_arguments(tmp_path))
    SDSCallback(log_conditions=False).add_to(run)
    run.train()
    assert logged(reported) == [set()] * 3
    assert same(weights(run.model), by_hand("backward"))  # pyright: ignore


def test_it_can_record_beside_an_optimizer_that_corrects(tmp_path: Path, reported: Logger) -> None:
    run = trainer(as_factory, logging_arguments(tmp_path))
    SDSCallback(None).add_to(run)
    run.train()
    assert logged(reported) == [CONDITIONS] * 3
    assert same(weights(run.model), by_hand("optimizer"))  # pyright: ignore


def test_zero_factors_have_none(tmp_path: Path, reported: Logger) -> None:
    """At a learning rate of 0, B stays zero."""
    args = logging_arguments(tmp_path, learning_rate=0.0)
    run = trainer(bare, args)
    with torch.no_grad():
        for pair in find_pairs(run.model):  # pyright: ignore
            pair.B.zero_()
    SDSCallback().add_to(run)
    run.train()
    assert logged(reported) == [{"sds/condition_A"}] * 3


def test_hooks_are_on_the_model_while_it_trains(tmp_path: Path) -> None:
    counts: list[int] = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            counts.append(hooked(kwargs["model"]))

    run = trainer(lambda model, args: {"callbacks": [SDSCallback(), Count()]}, arguments(tmp_path))
    run.train()
    assert counts == [2 * len(find_pairs(run.model))] * 6  # pyright: ignore
    assert hooked(run.model) == 0


class FailOnce(transformers.TrainerCallback):
    """Raises at the end of the second step of the first training."""

    def __init__(self, message: str = "lost the machine") -> None:
        self.message = message

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.message:
            message, self.message = self.message, ""
            raise RuntimeError(message)


def failed(folder: Path) -> tuple[transformers.Trainer, SDSCallback]:
    callback = SDSCallback()
    run = trainer(lambda model, args: {"callbacks": [callback, FailOnce()]}, arguments(folder))
    with pytest.raises(RuntimeError, match="lost the machine"):
        run.train()
    return run, callback


def test_training_that_raised_goes_on(tmp_path: Path) -> None:
    """The Trainer says nothing to its callbacks then: the hooks are still there, and are not doubled."""
    trained(as_callback, tmp_path)
    run, _ = failed(tmp_path)
    assert hooked(run.model)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(weights(run.model), by_hand("backward"))  # pyright: ignore
    assert hooked(run.model) == 0


def test_hooks_of_training_that_raised_can_be_removed(tmp_path: Path) -> None:
    run, callback = failed(tmp_path)
    with pytest.raises(DoubleCorrectionError, match=r"remove\(\)"):
        sdsopt.attach(run.model, "scaled")  # pyright: ignore
    callback.remove()
    callback.remove()
    assert hooked(run.model) == 0
    run, _ = failed(tmp_path)
    sdsopt.attach(run.model).remove()  # what the documentation says for those who lost the callback  # pyright: ignore
    assert hooked(run.model) == 0


def test_a_smaller_batch_after_running_out_of_memory(tmp_path: Path) -> None:
    """Accelerate calls the training loop again, from the weights that there are then; `on_train_end` never came."""
    out_of_memory = FailOnce("CUDA out of memory.")
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 3, "save_strategy": "no"}
    counts: list[tuple[int, int]] = []

    class Count(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            counts.append((hooked(kwargs["model"]), state.train_batch_size))

    callbacks = [SDSCallback(), Count(), out_of_memory]
    run = trainer(lambda model, args: {"callbacks": callbacks}, arguments(tmp_path, **options))
    run.train()
    factors = 2 * len(find_pairs(run.model))  # pyright: ignore
    assert counts == [(factors, 3)] * 2 + [(factors, 2)] * 6
    assert hooked(run.model) == 0


def test_a_new_model_for_each_run(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_strategy="no")
    data = trainer(bare, args).train_dataset
    run = transformers.Trainer(args=args, model_init=adapted, train_dataset=data, callbacks=[SDSCallback()])  # pyright: ignore
    for _ in range(2):
        run.train()
        assert same(weights(run.model), by_hand("backward"))  # pyright: ignore


def test_a_wrapped_optimizer_beside_it_is_refused(tmp_path: Path) -> None:
    run = trainer(as_factory, arguments(tmp_path))
    before = weights(run.model)  # pyright: ignore
    SDSCallback().add_to(run)
    with pytest.raises(DoubleCorrectionError, match="Use one of the two"):
        run.train()
    assert same(weights(run.model), before)  # pyright: ignore


def test_corrections_that_need_the_wrapper_are_refused(tmp_path: Path) -> None:
    run = trainer(lambda model, args: {"callbacks": [SDSCallback("sds-split")]}, arguments(tmp_path))
    with pytest.raises(UnsupportedCorrectionError, match="SDSPreconditioner"):
        run.train()


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    run = trainer(lambda model, args: {"callbacks": [SDSCallback()]}, arguments(tmp_path))
    run.model = run.model_wrapped = adapted().unload().requires_grad_()
    with pytest.raises(NoPairsError, match="found no LoRA pair"):
        run.train()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_a_copy_taken_while_it_trains_has_no_hooks(copied: Any, tmp_path: Path) -> None:
    """Ray sends the callbacks of LLaMA-Factory to its workers."""
    run, callback = failed(tmp_path)
    other = copied(callback)
    other.remove()
    assert hooked(run.model)
    callback.remove()

    again = trainer(lambda model, args: {"callbacks": [other]}, arguments(tmp_path))
    again.train()
    assert same(weights(again.model), by_hand("backward"))  # pyright: ignore


def test_every_linear_correction_acts(tmp_path: Path) -> None:
    runs = [
        trained(lambda model, args, c=c: {"callbacks": [SDSCallback(c)]}, tmp_path, save_strategy="no")
        for c in ("sds", "scaled", "lora")
    ]
    assert all_differ(runs[0], runs[1])
    assert same(runs[2], by_hand("nowhere"))
