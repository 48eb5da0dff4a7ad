"""Time per step relative to plain LoRA, on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import median

from sdsopt.compare.grid import Run, Settings
from sdsopt.compare.methods import LORA, Inner, Method
from sdsopt.compare.store import JsonLines
from sdsopt.compare.sweep import sweep_fingerprint
from sdsopt.compare.task import Task
from sdsopt.compare.train import build, reproducible

StepTimes = Mapping[tuple[str, int, str], float]  # (inner, rank, method) → time of a step as a multiple of plain LoRA's


def step_times_file(directory: Path) -> JsonLines:
    """Returns the file of a folder's measurements."""
    return JsonLines(directory / "step_times.jsonl")


def step_times(task: Task, settings: Settings, directory: Path, rounds: int = 25) -> StepTimes:
    """Measures the methods side by side, or reads what was measured before. Empty without plain LoRA.

    Args:
        task: A prepared task.
        settings: Names the methods.
        directory: Where measurements are looked for and added.
        rounds: Steps of each method.
    """
    if LORA not in settings.methods:
        return {}
    store = step_times_file(directory)
    result: dict[tuple[str, int, str], float] = {}
    for inner, rank in product(settings.inners, dict.fromkeys(settings.ranks)):
        key = [sweep_fingerprint(task), inner.name, rank, *(m.identity for m in settings.methods)]
        relative: dict[str, float] | None = next((x["relative"] for x in store.read() if x.get("key") == key), None)
        if relative is None:
            relative = _measure(task, settings.methods, inner, rank, rounds)
            store.append({"key": key, "relative": relative})
        result |= {(inner.name, rank, method): value for method, value in relative.items()}
    return result


def _measure(task: Task, methods: Sequence[Method], inner: Inner, rank: int, rounds: int) -> dict[str, float]:
    with reproducible(seed=0):
        steps = [_stepper(task, Run(method, inner, 1e-6, 0, rank, rounds)) for method in methods]
        for step in steps:
            step()  # the first step allocates the optimizer's state
        # Round by round: whatever else the machine does in a round slows all methods alike, and the ratio holds.
        times = [[step() for step in steps] for _ in range(rounds)]
    baseline = methods.index(LORA)
    return {method.name: round(median(row[i] / row[baseline] for row in times), 3) for i, method in enumerate(methods)}


def _stepper(task: Task, run: Run) -> Callable[[], float]:
    model, optimizer = build(task, run)
    batch = next(task.batches(0))

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        loss.item()  # waits for an accelerator
        return time.perf_counter() - started

    return step
