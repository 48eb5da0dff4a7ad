"""Short runs of Hugging Face's Trainer on a tiny model, and the loop that each must equal, written by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

import sdsopt
from sdsopt import SDSAdamW, SDSPreconditioner
from sdsopt.integrations.transformers import SDSCallback, SDSOptimizerFactory
from tiny_models import MODELS

# Each training of the Trainer collects garbage, which takes longer than the training with all that is imported here.
gc.freeze()

STEPS = 6
RATE = 1e-2

Batch = dict[str, Tensor]
Weights = dict[str, Tensor]
# How a correction is plugged into a Trainer: its further arguments, of the model and the training arguments.
Plug = Callable[[PeftModel, transformers.TrainingArguments], dict[str, Any]]


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """36 sequences of 8 tokens."""

    def __len__(self) -> int:
        return 36

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(3, 60, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def adapted() -> PeftModel:
    return MODELS["llama"]()[0]


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def weights(model: torch.nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def arguments(
    folder: Path, cls: type[transformers.TrainingArguments] = transformers.TrainingArguments, **options: Any
) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.1,
        "learning_rate": RATE,
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**defaults, **options})


def trainer(
    plug: Plug, args: transformers.TrainingArguments, cls: type[transformers.Trainer] = transformers.Trainer
) -> transformers.Trainer:
    model = adapted()
    return cls(model, args, train_dataset=Tokens(), **plug(model, args))  # pyright: ignore


def trained(
    plug: Plug,
    folder: Path,
    resume: Path | None = None,
    cls: type[transformers.Trainer] = transformers.Trainer,
    **options: Any,
) -> Weights:
    run = trainer(plug, arguments(folder, **options), cls)
    run.train(resume_from_checkpoint=resume and str(resume))
    return weights(run.model)  # pyright: ignore


def bare(model: PeftModel, args: transformers.TrainingArguments) -> dict[str, Any]:
    return {}


def as_optimizer(model: PeftModel, args: transformers.TrainingArguments) -> dict[str, Any]:
    optimizer = SDSPreconditioner(AdamW(trainable(model), lr=args.learning_rate, weight_decay=0.0), model)
    return {"optimizers": (optimizer, None)}


def as_factory(model: PeftModel, args: transformers.TrainingArguments) -> dict[str, Any]:
    return {"optimizer_cls_and_kwargs": (SDSOptimizerFactory, {"training_args": args})}


def as_class(model: PeftModel, args: transformers.TrainingArguments) -> dict[str, Any]:
    sdsopt.link(model)
    return {"optimizer_cls_and_kwargs": (SDSAdamW, {"lr": args.learning_rate})}


def as_callback(model: PeftModel, args: transformers.TrainingArguments) -> dict[str, Any]:
    return {"callbacks": [SDSCallback()]}


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def scaler() -> torch.amp.GradScaler:
    """One whose first scale overflows in fp16, so that steps are skipped."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**20)


def reset_accelerate() -> None:
    """Accelerate keeps the precision and the accumulation of its first Accelerator in its classes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def set_up_fp16(accelerator: Accelerator) -> None:
    """As Accelerate does it on a GPU; on a CPU it silently trains in fp32 instead."""
    accelerator.native_amp = True
    accelerator.scaler = scaler()  # pyright: ignore


def fresh_accelerator(precision: str, accumulation: int = 1) -> Accelerator:
    reset_accelerate()
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(cpu=True, mixed_precision=mixed, gradient_accumulation_steps=accumulation)
    if precision == "fp16":
        set_up_fp16(accelerator)
    return accelerator


def model_loss(model: PeftModel, batch: Batch, tokens: Tensor) -> Tensor:
    """The sum over this micro-batch, by the number of tokens of the whole batch."""
    return model(**batch, num_items_in_batch=tokens).loss


def by_hand(
    place: str,
    *,
    model: PeftModel | None = None,
    batches: Iterable[Batch] | None = None,
    loss_of: Callable[[PeftModel, Batch, Tensor], Tensor] = model_loss,
    precision: str = "fp32",
    accumulation: int = 2,
    max_grad_norm: float = 0.1,
    corrected: range = range(STEPS),
) -> Weights:
    """Trains as the Trainer does.

    Args:
        place: Where gradients are corrected: in the "optimizer", in "backward", or "nowhere".
        model: The model; the one of `trainer` by default.
        batches: What its data loader yields.
        loss_of: The loss of a model, a micro-batch and a number of tokens.
        precision: "fp32", or of the autocast; fp16 comes with a scaler.
        accumulation: Micro-batches for each step.
        max_grad_norm: Clips the gradients where the Trainer does; 0 does not.
        corrected: The steps in which the optimizer corrects.
    """
    model = model or adapted()
    inner = AdamW(trainable(model), lr=RATE, weight_decay=0.0)
    wrapper = SDSPreconditioner(inner, model) if place == "optimizer" else None
    if place == "backward":
        sdsopt.attach(model)
    schedule = transformers.get_scheduler("linear", inner, num_warmup_steps=0, num_training_steps=STEPS)
    dtype = AUTOCAST[precision]
    scale = torch.amp.GradScaler("cpu", enabled=False) if dtype != torch.float16 else scaler()
    loader = iter(batches or torch.utils.data.DataLoader(Tokens(), batch_size=2))
    for step in range(STEPS):
        group = [next(loader) for _ in range(accumulation)]
        tokens = torch.stack([batch["labels"][:, 1:].ne(-100).sum() for batch in group]).sum()
        for batch in group:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(model, batch, tokens)
            scale.scale(loss).backward()
        optimizer = wrapper if wrapper and step in corrected else inner
        scale.unscale_(optimizer)
        if max_grad_norm:
            clip_grad_norm_(trainable(model), max_grad_norm)
        scale.step(optimizer)
        before = scale.get_scale()
        scale.update()
        if scale.get_scale() >= before:  # else the step was skipped
            schedule.step()
        model.zero_grad()
    return weights(model)


def same(one: Weights, other: Weights) -> bool:
    """Whether all are finite, and equal bit for bit."""
    assert one and one.keys() == other.keys()
    assert all(tensor.isfinite().all() for tensor in one.values())
    return all(torch.equal(one[name], other[name]) for name in one)


def all_differ(one: Weights, other: Weights) -> bool:
    """Whether no tensor is what it is in the other run."""
    assert one and one.keys() == other.keys()
    return not any(torch.equal(one[name], other[name]) for name in one)
