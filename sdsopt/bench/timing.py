"""Timing side by side, on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from sdsopt.bench.adapter import Adapter
from sdsopt.bench.contenders import Contender
from sdsopt.bench.memory import peak_extra_bytes

_SLOW = 5.0  # seconds a run; what takes longer is run once


@dataclass(frozen=True)
class Timing:
    """One contender's numbers.

    Attributes:
        name: The contender's.
        seconds: Median time of a run.
        quartiles: First and third quartile of that time.
        correction: Median over the rounds of the time beyond the baseline's of the same round, in seconds.
        ratio: Median over the rounds of (AdamW + correction) / AdamW.
        extra_bytes: The most memory that a run held beside parameters, gradients and optimizer state; None where a run
            replaces the gradients.
    """

    name: str
    seconds: float
    quartiles: tuple[float, float]
    correction: float
    ratio: float
    extra_bytes: int | None


@dataclass(frozen=True)
class Stopwatch:
    """How time is taken.

    Attributes:
        device: Where the work is done.
        clock: "wall" or "cpu", as in `Settings`.
    """

    device: str
    clock: str

    def seconds(self, function: Callable[[], object]) -> float:
        """Runs a function and returns its time, the device's work included."""
        read = time.process_time if self.clock == "cpu" else time.perf_counter
        self._wait()
        started = read()
        function()
        self._wait()
        return read() - started

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def run_rounds(
    adapter: Adapter, contenders: Sequence[Contender], rounds: int, stopwatch: Stopwatch
) -> tuple[list[Timing], dict[str, str]]:
    """Times all contenders in turn, round by round.

    Whatever else the machine does in a round slows all of them alike, so differences and ratios are taken within
    a round, and medians over the rounds.

    Args:
        adapter: Gives every run fresh gradients.
        contenders: The first is the bare optimizer.
        rounds: Runs of each, after a first one that is not timed. What takes seconds is run once.
        stopwatch: Takes the time.

    Returns:
        The timings, and the error of each contender that failed.
    """
    extra: dict[str, int | None] = {}
    failed: dict[str, str] = {}
    for contender in contenders:
        adapter.backward()
        try:
            with contender.ready():
                peak = peak_extra_bytes(contender.run, stopwatch.device)
        except Exception as error:  # a peer's failure is a finding, and must not end the measurement
            if not contender.foreign:
                raise
            failed[contender.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            own = max(0, peak - contender.state_bytes())
            extra[contender.name] = None if contender.frees_gradients else own
    running = [contender for contender in contenders if contender.name not in failed]

    rows: list[dict[str, float]] = []
    for _ in range(rounds):
        fast = [c for c in running if not rows or rows[0][c.name] < _SLOW]
        rows.append({contender.name: _time(adapter, contender, stopwatch) for contender in fast})
    bare = contenders[0].name
    timings: list[Timing] = []
    for contender in running:
        times = [row for row in rows if contender.name in row]
        own = [row[contender.name] for row in times]
        corrections = [row[contender.name] - row[contender.baseline] for row in times]
        timings.append(
            Timing(
                name=contender.name,
                seconds=median(own),
                quartiles=_quartiles(own),
                correction=median(corrections),
                ratio=median(1 + correction / row[bare] for correction, row in zip(corrections, times, strict=True)),
                extra_bytes=extra[contender.name],
            )
        )
    return timings, failed


def _time(adapter: Adapter, contender: Contender, stopwatch: Stopwatch) -> float:
    adapter.backward()
    with contender.ready():
        return stopwatch.seconds(contender.run)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4)
    return first, third
