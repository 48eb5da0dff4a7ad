"""One run: from a `Run` to its `Record`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import nn
from torch.optim import Optimizer

from sdsopt.compare.grid import Run
from sdsopt.compare.records import Record
from sdsopt.compare.task import Task
from sdsopt.diagnostics.conditioning import median_condition_numbers
from sdsopt.pairs import find_pairs

_KAPPA_POINTS = 20  # per run, evenly spaced
_WARM_UP = 0.1  # share of the steps


@contextmanager
def reproducible(seed: int) -> Generator[None]:
    """Seeds torch's generators and uses one thread; on exit, both are as they were.

    One thread, because sums depend on how they are split; and because the models here are too small for two.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def build(task: Task, run: Run) -> tuple[nn.Module, Optimizer]:
    """Returns the run's model and its optimizer, each param group's "lr" at its peak."""
    model = task.build_model(run.rank if run.method.adapts else None)
    shared = [parameter for parameter in task.shared_parameters(model) if parameter.requires_grad]
    shared_ids = {id(parameter) for parameter in shared}
    swept = [p for p in model.parameters() if p.requires_grad and id(p) not in shared_ids]
    groups = [{"params": swept, "lr": run.lr}]
    if shared:  # an empty group breaks some optimizers
        groups.append({"params": shared, "lr": run.inner.shared_lr})
    return model, run.method.wrap(run.inner.build(groups), model)


Watch = Callable[[nn.Module, Optimizer], AbstractContextManager[object]]


def train(task: Task, run: Run, fingerprint: str, watch: Watch | None = None) -> Record:
    """Trains with a short warm-up and a cosine to zero, and evaluates. Divergence is a result, not an error.

    Args:
        task: A prepared task.
        run: What to train.
        fingerprint: Copied into the record.
        watch: Opens what looks on while the model trains, such as a `Recorder`.
    """
    started = time.perf_counter()
    with reproducible(run.seed):
        model, optimizer = build(task, run)
        with watch(model, optimizer) if watch else nullcontext():
            curve = _optimize(task, run, model, optimizer)
        accuracy = None if curve.diverged else _evaluate(task, model)
    return Record(
        fingerprint=fingerprint,
        key=run.key,
        method=run.method.name,
        inner=run.inner.name,
        lr=run.lr,
        seed=run.seed,
        rank=run.rank,
        steps=run.steps,
        losses=tuple(curve.losses),
        diverged=curve.diverged,
        accuracy=accuracy,
        kappa_steps=tuple(curve.kappa_steps),
        kappa_A=tuple(a for a, _ in curve.kappas),
        kappa_B=tuple(b for _, b in curve.kappas),
        seconds=round(time.perf_counter() - started, 3),
    )


@dataclass
class _Curve:
    losses: list[float] = field(default_factory=list)
    kappa_steps: list[int] = field(default_factory=list)
    kappas: list[tuple[float | None, float | None]] = field(default_factory=list)
    diverged: bool = False


def _optimize(task: Task, run: Run, model: nn.Module, optimizer: Optimizer) -> _Curve:
    curve = _Curve()
    pairs = find_pairs(model) if run.method.adapts else ()
    peaks = [group["lr"] for group in optimizer.param_groups]
    interval = max(1, run.steps // _KAPPA_POINTS)

    for step, batch in enumerate(islice(task.batches(run.seed), run.steps)):
        if pairs and step % interval == 0:
            curve.kappa_steps.append(step)
            curve.kappas.append(median_condition_numbers(pairs))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _schedule(step, run.steps)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        value = loss.item()
        if not math.isfinite(value):
            curve.diverged = True
            return curve
        curve.losses.append(value)
        loss.backward()
        optimizer.step()

    if len(curve.losses) < run.steps:
        raise ValueError(f"{task.name}.batches ended after {len(curve.losses)} of {run.steps} steps")
    return curve


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, int(_WARM_UP * steps))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _evaluate(task: Task, model: nn.Module) -> float | None:
    model.eval()
    accuracy = float(task.evaluate(model))
    return accuracy if math.isfinite(accuracy) else None
