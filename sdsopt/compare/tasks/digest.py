"""What identifies files, wherever they lie."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


def digest(path: Path) -> str:
    """Returns a hash of a file, or of the names and contents of a folder's files; hidden ones do not count."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    names = [file.relative_to(path) for file in files]
    shown = [(name, file) for name, file in zip(names, files, strict=True) if not any(p[0] == "." for p in name.parts)]
    return hashlib.sha256("\n".join(f"{name.as_posix()} {_of_file(file)}" for name, file in shown).encode()).hexdigest()


def _of_file(file: Path) -> str:
    status = file.stat()
    return _of_contents(file, status.st_size, status.st_mtime_ns)


@cache
def _of_contents(file: Path, size: int, modified: int) -> str:
    """Read once as long as the file does not change."""
    del size, modified
    result = hashlib.blake2b()
    with file.open("rb") as content:
        while part := content.read(2**20):
            result.update(part)
    return result.hexdigest()
