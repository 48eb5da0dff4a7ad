"""The factory builds what the Trainer would have built, and wraps it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.optim import SGD, AdamW

from hf_runs import Plug, Weights, adapted, arguments, bare, by_hand, same, trainable, trained, trainer, weights
from sdsopt import GramPower, SDSPreconditioner
from sdsopt.errors import NoPairsError, UnknownCorrectionError
from sdsopt.integrations.transformers import SDSOptimizerFactory
from tiny_models import DECODER, MODELS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def dora_with_biases() -> torch.nn.Module:
    """Trains magnitudes, biases and norms beside the adapters."""
    config = transformers.Qwen2Config(**DECODER)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, bias="all")
    model = peft.get_peft_model(transformers.Qwen2ForCausalLM(config), lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad |= "layernorm" in name
    return model


BUILT: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": adapted,
    "head": lambda: MODELS["bert"]()[0],
    "dora": dora_with_biases,
}


def groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]


@pytest.mark.parametrize("name", BUILT)
def test_groups_are_the_trainers(name: str, tmp_path: Path) -> None:
    model = BUILT[name]()
    args = arguments(tmp_path, weight_decay=0.1)
    expected = transformers.Trainer(model, args).create_optimizer()  # pyright: ignore
    optimizer = SDSOptimizerFactory()(model, args)
    assert groups(optimizer) == groups(expected)
    assert [bool(group["params"]) for group in groups(optimizer)] == [True, name != "plain"]


OPTIMS = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
IN_PACKAGES = {"adamw_bnb_8bit": "bitsandbytes", "lion_32bit": "bitsandbytes", "schedule_free_adamw": "schedulefree"}


@pytest.mark.parametrize("optim", [*OPTIMS, *IN_PACKAGES])
def test_the_optimizer_is_the_one_of_the_arguments(optim: str, tmp_path: Path) -> None:
    if optim in IN_PACKAGES:
        pytest.importorskip(IN_PACKAGES[optim], exc_type=ImportError)
    args = arguments(
        tmp_path, optim=optim, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-5, learning_rate=3e-3, weight_decay=0.2
    )
    model = adapted()
    expected = transformers.Trainer(model, args).create_optimizer()  # pyright: ignore
    optimizer = SDSOptimizerFactory()(model, args)
    assert type(optimizer.inner) is type(expected)
    assert groups(optimizer) == groups(expected)


def test_what_is_given_goes_before_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path, weight_decay=0.2)
    optimizer = SDSOptimizerFactory()(
        adapted(),
        args,
        lr=0.5,
        weight_decay=0.3,
        optimizer_cls=SGD,
        optimizer_kwargs={"momentum": 0.9},
        correction=GramPower(0.25),
    )
    assert type(optimizer.inner) is SGD
    assert optimizer.param_groups[0] == optimizer.param_groups[0] | {"lr": 0.5, "weight_decay": 0.3, "momentum": 0.9}
    assert optimizer.correction == GramPower(0.25)
    betas = SDSOptimizerFactory()(adapted(), args, optimizer_kwargs={"betas": (0.5, 0.6)})
    assert betas.defaults["betas"] == (0.5, 0.6)


def test_without_arguments_it_is_adamw_that_does_not_decay() -> None:
    optimizer = SDSOptimizerFactory()(adapted(), lr=0.5)
    assert type(optimizer.inner) is AdamW
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.5, 0.0)] * 2


OPTIONS: list[dict[str, Any]] = [
    {"correction": "scaled"},
    {"damping": 0.5},
    {"rescale": "grad_norm"},
    {"max_grad_norm": 1e-4},
]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: next(iter(option)))
def test_options_reach_the_wrapper(option: dict[str, Any]) -> None:
    results: list[Weights] = []
    # SGD, since Adam hides the gradients' length.
    for build in (
        lambda model: SDSOptimizerFactory()(model, lr=0.1, optimizer_cls=SGD, **option),
        lambda model: SDSPreconditioner(SGD(trainable(model), lr=0.1), model, **option),
        lambda model: SDSPreconditioner(SGD(trainable(model), lr=0.1), model),
    ):
        model, batch = MODELS["llama"]()
        optimizer = build(model)
        model(**batch).loss.backward()
        optimizer.step()
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


@pytest.mark.parametrize(
    "option",
    [{"transport": "moments"}, {"rebalance_every": 2}, {"correction": "lora-rite-matrix"}],
    ids=lambda option: next(iter(option)),
)
def test_what_happens_between_steps_happens_in_a_trainer(option: dict[str, Any], tmp_path: Path) -> None:
    """And goes on from its checkpoint, where the moments, the count of the steps and what was remembered are."""

    def factory(**options: Any) -> Plug:
        return lambda model, args: {
            "optimizer_cls_and_kwargs": (SDSOptimizerFactory, {"training_args": args, **options})
        }

    def finished(model: Any, args: Any) -> dict[str, Any]:
        inner = AdamW(trainable(model), lr=args.learning_rate, weight_decay=0.0)
        return {"optimizers": (SDSPreconditioner(inner, model, **option), None)}

    found = trained(factory(**option), tmp_path)
    assert same(found, trained(finished, tmp_path / "finished"))
    assert not same(found, trained(factory(), tmp_path / "without"))
    assert same(found, trained(factory(**option), tmp_path / "resumed", tmp_path / "checkpoint-3"))


def test_a_bound_on_memory_reaches_the_optimizer() -> None:
    model, _ = MODELS["llama"]()
    with pytest.raises(ValueError, match="max_workspace_bytes must be a positive integer"):
        SDSOptimizerFactory()(model, lr=1e-3, max_workspace_bytes=0)


def test_a_learning_rate_is_needed(tmp_path: Path) -> None:
    def plug(model: Any, args: Any) -> dict[str, Any]:
        return {"optimizer_cls_and_kwargs": (SDSOptimizerFactory, {})}

    with pytest.raises(ValueError, match=r'no learning rate.*"training_args": args'):
        trained(plug, tmp_path)
    with pytest.raises(TypeError, match=r"multiple values.*'lr'"):
        SDSOptimizerFactory()(adapted(), lr=0.1, optimizer_kwargs={"lr": 0.2})


def test_an_instance_in_place_of_the_class(tmp_path: Path) -> None:
    def plug(model: Any, args: Any) -> dict[str, Any]:
        return {"optimizer_cls_and_kwargs": (SDSOptimizerFactory(), {"training_args": args})}

    with pytest.raises(TypeError, match=r"Give the Trainer the class and not an instance: .*\(SDSOptimizerFactory, "):
        trained(plug, tmp_path)


def test_clipping_twice_is_told(tmp_path: Path) -> None:
    model = adapted()
    with pytest.warns(UserWarning, match=r"raw ones .* norm of 0\.1, .* to 2\.0\. Set max_grad_norm=0") as caught:
        SDSOptimizerFactory()(model, arguments(tmp_path), max_grad_norm=2.0)
    assert caught[0].filename == __file__
    SDSOptimizerFactory()(adapted(), arguments(tmp_path, max_grad_norm=0.0), max_grad_norm=2.0)
    SDSOptimizerFactory()(adapted(), arguments(tmp_path))


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NoPairsError, match="found no LoRA pair"):
        SDSOptimizerFactory()(torch.nn.Linear(2, 2), lr=0.1)
    with pytest.raises(UnknownCorrectionError):
        SDSOptimizerFactory()(adapted(), lr=0.1, correction="nothing")
    with pytest.raises(ValueError, match="unknown inverse root"):
        SDSOptimizerFactory()(adapted(), lr=0.1, inverse_root="nothing")
    # What GaLore's and LOMO's handlers return, which are not installed here.
    for choice in ((AdamW, {"lr": 0.1, "params": []}), (SGD, {"lr": 0.1, "model": adapted()})):
        monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda args, model, c=choice: c)
        with pytest.raises(ValueError, match="optim=adamw_torch chooses the parameters that it trains by itself"):
            SDSOptimizerFactory()(adapted(), arguments(tmp_path))


def test_it_is_pickled_with_a_trainer() -> None:
    """Ray and LLaMA-Factory send what a trainer is made of to other processes."""
    plug = (SDSOptimizerFactory, {"lr": 0.1, "correction": "sds"})
    cls, options = pickle.loads(pickle.dumps(plug))
    assert cls is SDSOptimizerFactory
    assert isinstance(copy.deepcopy(cls())(adapted(), **options), SDSPreconditioner)


def test_deepspeed_takes_empty_groups_off() -> None:
    """Its engine edits the list of groups in place before it partitions them; this is its statement."""
    basic_optimizer = SDSOptimizerFactory()(adapted(), lr=0.1)
    basic_optimizer.param_groups[:] = [pg for pg in basic_optimizer.param_groups if len(pg["params"]) != 0]
    assert len(basic_optimizer.inner.param_groups) == 1


def test_a_new_model_for_each_run_gets_its_own_optimizer(tmp_path: Path) -> None:
    """As in a hyperparameter search."""
    args = arguments(tmp_path, save_strategy="no")
    run = transformers.Trainer(
        args=args,
        model_init=adapted,
        train_dataset=trainer(bare, args).train_dataset,
        optimizer_cls_and_kwargs=(SDSOptimizerFactory, {"training_args": args}),  # pyright: ignore
    )
    for _ in range(2):
        run.train()
        assert run.model is not None
        assert same(weights(run.model), by_hand("optimizer"))
