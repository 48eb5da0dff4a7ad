"""A progress bar with the time left."""

from __future__ import annotations

import time

from sdsopt.compare.observer import Observer
from sdsopt.compare.records import Record
from sdsopt.extras import extra

with extra("demo"):
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class RichObserver(Observer):
    """Draws the sweep on a terminal, and prints a line now and then elsewhere, such as in a CI log.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._total, self._before, self._done = 0, 0, 0
        self._start = self._last_line = 0.0
        self._diverged = 0
        self._widened = False

    def stage(self, text: str) -> None:
        """Names what goes on."""
        self._bar.start()
        self._bar.update(self._task, description=text, total=None, left="")
        self._plain(text)

    def started(self, total: int, done: int) -> None:
        """Starts counting."""
        self._total, self._before, self._done = total, done, done
        self._start = self._last_line = time.monotonic()
        if done and not self._widened:
            self._console.print(f"{done} of {total} runs are on disk already")
        self._bar.update(self._task, description="running", total=total, completed=done)

    def widened(self) -> None:
        """Says why there is more to do."""
        self._widened = True
        self._console.print("a best learning rate is the edge of its grid: one more rate for each method")

    def finished(self, record: Record) -> None:
        """Moves the bar. Runs found on disk took no time, so they do not count in the estimate."""
        self._done += 1
        self._diverged += record.diverged
        elapsed = time.monotonic() - self._start
        seconds = elapsed / (self._done - self._before) * (self._total - self._done)
        left = f"{int(seconds) // 60}:{int(seconds) % 60:02d} left"
        if self._diverged:
            left += f", {self._diverged} diverged"
        self._bar.update(self._task, completed=self._done, left=left)
        if time.monotonic() - self._last_line > 15:
            self._last_line = time.monotonic()
            self._plain(f"{self._done}/{self._total} runs, {left}")

    def closed(self) -> None:
        """Takes the bar away."""
        self._bar.stop()

    def _plain(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text)
