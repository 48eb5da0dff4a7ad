"""Puts a finished file or folder in its place in one step, so that there is never half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from sdsopt.errors import AdapterError

_PREFIX = ".sdsopt-"


def check_target(source: Path, target: Path, names: set[str] | None, *, force: bool) -> None:
    """Makes sure that the result may go to `target`, without losing anything that is there.

    Args:
        source: The adapter that is read.
        target: Where the result goes.
        names: The names of the files to put into the folder `target`; None if it is to be a file.
        force: Whether what is at `target` may be replaced.

    Raises:
        AdapterError: It may not; says why and what to do.
    """
    if not target.parent.is_dir():
        raise AdapterError(f"{target.parent} is no folder; create it first")
    if not target.exists():
        return
    if names is None and target.is_dir():
        raise AdapterError(f"{target} is a folder, and {source} a single file; name the file to write")
    if names is not None and not target.is_dir():
        raise AdapterError(f"{target} is a file, and {source} a folder; name a folder to write")
    present = {path.name for path in target.iterdir()} if names is not None else {target.name}
    if not present:
        return
    if not force:
        raise AdapterError(f"{target} exists; choose another place, or replace it with --force (force=True)")
    lost = sorted(present - names) if names is not None else []
    if lost:
        raise AdapterError(
            f"{target} also holds {', '.join(map(repr, lost[:3]))}{', …' * (len(lost) > 3)}, which would be lost; "
            "choose another place"
        )


@contextmanager
def published(target: Path, *, folder: bool) -> Generator[Path]:
    """Yields an empty folder, or the path of an empty file, beside `target`; moves it there if the block succeeds.

    Nothing is left behind if it fails. What is written is on the disk before it moves.
    """
    if folder:
        temporary = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
    else:
        handle, name = tempfile.mkstemp(prefix=_PREFIX, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
    try:
        yield temporary
        for path in sorted(temporary.iterdir()) if folder else [temporary]:
            _sync(path)
        if folder:
            _sync(temporary)
            _replace_folder(temporary, target)
        else:
            temporary.replace(target)
        _sync(target.parent)
    except BaseException:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _replace_folder(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
        return
    # No system call puts one folder over another: the old one steps aside, and back if something goes wrong.
    aside = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent)) / "old"
    target.rename(aside)
    try:
        new.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
