"""What a sweep tells whoever watches it."""

from __future__ import annotations

from sdsopt.compare.records import Record


class Observer:
    """Hears of a sweep's progress. The default stays silent; override what you want to show."""

    def stage(self, text: str) -> None:
        """Something other than runs goes on, such as pretraining."""

    def started(self, total: int, done: int) -> None:
        """There are `total` runs, of which `done` were found on disk."""

    def widened(self) -> None:
        """Some best learning rate is an edge of its grid; the grids grow, and `started` follows."""

    def finished(self, record: Record) -> None:
        """One more run is on disk."""

    def closed(self) -> None:
        """Nothing follows; also called after an error."""
