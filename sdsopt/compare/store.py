"""Results on disk: JSON lines that survive a crash at any moment."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """A file of JSON objects, one a line, that is only ever appended to.

    Args:
        path: The file; it and its folder are made by the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Returns the objects, oldest first. A line that is not whole is left out: its run is simply done again."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        return [parsed for line in lines if isinstance(parsed := _parse(line), dict)]

    def append(self, data: dict[str, Any]) -> None:
        """Adds one line, on disk when this returns."""
        line = json.dumps(data, allow_nan=False).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            # A write that a crash cut short left no newline; without one, this line would be lost with it.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            # One write: with O_APPEND, two sweeps into one folder do not mix their lines.
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(f"could not write to {self.path}: is the disk full?")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def clear(self) -> None:
        """Forgets all objects."""
        self.path.unlink(missing_ok=True)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
