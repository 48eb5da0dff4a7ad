"""One run: from a `Run` to its `Record`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice

import torch
from torch import nn
from torch.optim import Optimizer

from sdsopt.compare.grid import Run
from sdsopt.compare.probe import Probe
from sdsopt.compare.records import Record
from sdsopt.compare.task import Task
from sdsopt.pairs import find_pairs

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
    return model, run.method.set_up(model, run.inner.build(groups), run.steps)


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
            method = run.method
            probe = Probe(find_pairs(model) if method.adapts else (), method.correction, method.damping, run.steps)
            losses, diverged = _optimize(task, run, model, optimizer, probe)
        accuracy = None if diverged else _evaluate(task, model)
        spectra = ((), (), ()) if diverged else probe.spectra()
    return Record(
        fingerprint=fingerprint,
        key=run.key,
        method=run.method.name,
        inner=run.inner.name,
        lr=run.lr,
        seed=run.seed,
        rank=run.rank,
        steps=run.steps,
        losses=tuple(losses),
        diverged=diverged,
        accuracy=accuracy,
        kappa_steps=tuple(probe.kappa_steps),
        kappa_A=tuple(a for a, _ in probe.kappas),
        kappa_B=tuple(b for _, b in probe.kappas),
        seconds=round(time.perf_counter() - started, 3),
        spectrum_A=spectra[0],
        spectrum_B=spectra[1],
        spectrum_product=spectra[2],
        alignment_steps=tuple(probe.alignment_steps),
        alignment=tuple(probe.alignments),
    )


def _optimize(task: Task, run: Run, model: nn.Module, optimizer: Optimizer, probe: Probe) -> tuple[list[float], bool]:
    """Returns the losses, and whether they stopped being finite."""
    losses: list[float] = []
    peaks = [group["lr"] for group in optimizer.param_groups]

    for step, batch in enumerate(islice(task.batches(run.seed), run.steps)):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * _schedule(step, run.steps)
        optimizer.zero_grad()
        with probe.around(step):
            loss = task.loss(model, batch)
            value = loss.item()
            if not math.isfinite(value):
                return losses, True
            losses.append(value)
            loss.backward()
        optimizer.step()

    if len(losses) < run.steps:
        raise ValueError(f"{task.name}.batches ended after {len(losses)} of {run.steps} steps")
    return losses, False


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, int(_WARM_UP * steps))
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _evaluate(task: Task, model: nn.Module) -> float | None:
    model.eval()
    accuracy = float(task.evaluate(model))
    return accuracy if math.isfinite(accuracy) else None
