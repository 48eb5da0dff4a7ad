"""The ways by which frameworks around the Trainer take an optimizer or a callback.

Axolotl, ms-swift, LLaMA-Factory and Unsloth are not installed here. What stands in for them is written to the shapes
that they publish (Axolotl 0.18, ms-swift 4.6, LLaMA-Factory 0.9.6, Unsloth of August 2026), as far as it concerns us.
"""

from __future__ import annotations

import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.trainer_optimizer import is_optimizer_factory

import oracle
from documented import blocks, execute
from hf_runs import all_differ, arguments, as_factory, bare, by_hand, same, trained, trainer, weights
from recorder import corrected_gradients
from sdsopt import attach, find_pairs
from toy import LoRALinear, lora_linear

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


PAGE = "docs/use-with/huggingface.md"


def run_documented(heading: str, monkeypatch: pytest.MonkeyPatch, module: str, **contents: Any) -> dict[str, Any]:
    """Runs the code under a heading of the page, with a module of that name in place of the framework's."""
    stand_in = types.ModuleType(module)
    vars(stand_in).update(contents)
    parts = module.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, module, stand_in)
    [code] = blocks(PAGE, heading)
    return execute(code, PAGE)


class AxolotlTrainer(transformers.Trainer):
    """`axolotl.core.trainers.mixins.optimizer.OptimizerMixin`: it passes the training arguments to a factory."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer_cls_and_kwargs is None:
            return super().create_optimizer(model)
        factory: Any
        factory, options = self.optimizer_cls_and_kwargs
        assert is_optimizer_factory(factory)
        self.optimizer = factory()(self.model if model is None else model, self.args, **options)
        return self.optimizer


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_axolotl(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML's `optimizer:` is `optim` of the training arguments."""
    names = run_documented("### Axolotl", monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    run = trainer(bare, arguments(tmp_path, optim=optim, save_strategy="no"), AxolotlTrainer)
    names["SDSPlugin"]().post_trainer_create({}, run)
    run.train()
    found = weights(run.model)  # pyright: ignore
    assert same(found, trained(as_factory, tmp_path, optim=optim, save_strategy="no"))
    assert all_differ(found, trained(bare, tmp_path, optim=optim, save_strategy="no"))


class OptimizerCallback:
    """`swift.optimizers.OptimizerCallback`."""

    def __init__(self, args: transformers.TrainingArguments, trainer: transformers.Trainer) -> None:
        self.args = args
        self.trainer = trainer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        options = {} if model is None else {"model": model}
        return transformers.Trainer.create_optimizer(self.trainer, **options)


def test_ms_swift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers_map: dict[str, type[OptimizerCallback]] = {"default": OptimizerCallback}
    shape = {"OptimizerCallback": OptimizerCallback, "optimizers_map": optimizers_map}
    run_documented("### ms-swift", monkeypatch, "swift.optimizers", **shape)

    class SwiftTrainer(transformers.Trainer):
        """`swift.trainers.mixin.SwiftMixin` with `--optimizer sds`: it assigns the groups, without the empty ones."""

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = optimizers_map["sds"](self.args, self).create_optimizer(model=model)
            self.optimizer.param_groups = [pg for pg in self.optimizer.param_groups if len(pg["params"]) > 0]
            return self.optimizer

    whole = trained(bare, tmp_path, cls=SwiftTrainer)
    assert same(whole, by_hand("optimizer"))
    assert same(whole, trained(bare, tmp_path, tmp_path / "checkpoint-3", cls=SwiftTrainer))


class LogCallback(transformers.TrainerCallback):
    """Behind the user's callbacks, as LLaMA-Factory's own of that name."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(state.log_history[-1])


@pytest.mark.parametrize("ray", [False, True])
def test_llama_factory(ray: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = LogCallback()
    found: dict[str, Tensor] = {}

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        """It adds its own callbacks to the list and passes it on; under Ray, to another process."""
        callbacks = callbacks or []
        callbacks = [*(pickle.loads(pickle.dumps(callbacks)) if ray else callbacks), log]
        options = {"save_strategy": "no", "logging_steps": 3}
        found.update(trained(lambda model, args: {"callbacks": callbacks}, tmp_path, **options))

    run_documented("### LLaMA-Factory", monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    assert same(found, by_hand("backward"))
    assert ["sds/condition_A" in entry for entry in log.logs] == [True, True, False]


class FusedLoRA(torch.autograd.Function):
    """y = x·(s·B·A)ᵀ with its backward written out, as `unsloth.kernels.fast_lora.LoRA_W`.

    It reads the weights and never runs the modules that hold them; it returns transposed, non-contiguous gradients.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(X, A, B)
        ctx.s = s
        return X @ A.t() @ B.t() * s

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore
        X, A, B = ctx.saved_tensors
        d_A = torch.empty_like(A.t()).addmm_(X.t(), dY @ B, alpha=ctx.s, beta=0)
        d_B = torch.empty_like(B.t()).addmm_((X @ A.t()).t(), dY, alpha=ctx.s, beta=0)
        return ctx.s * dY @ B @ A, d_A.t(), d_B.t(), None


def fused_backward(layer: LoRALinear) -> None:
    X = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)).double()
    FusedLoRA.apply(X, layer.A, layer.B, layer.scaling["default"]).square().sum().backward()  # pyright: ignore


def test_unsloths_fused_layers() -> None:
    """Both modes correct gradients of layers that are never called."""
    layer, hooked = (lora_linear(dtype=torch.float64, scaling=2.0) for _ in range(2))
    fused_backward(layer)
    seen = corrected_gradients(layer, "sds")
    with attach(hooked):
        fused_backward(hooked)
    [pair] = find_pairs(layer)
    expected_A, expected_B = oracle.corrected_pair(pair, 0.5, 1e-6)
    for found_A, found_B in ((seen[layer.A], seen[layer.B]), (hooked.A.grad, hooked.B.grad)):
        assert found_A is not None
        assert found_B is not None
        assert oracle.relative_error(found_A, expected_A[0]) < 1e-9
        assert oracle.relative_error(found_B, expected_B[0]) < 1e-9
