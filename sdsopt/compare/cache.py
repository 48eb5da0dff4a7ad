"""A folder for what is slow to make and cheap to lose."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def cache_dir() -> Path:
    """Returns the platform's cache folder for sdsopt; `XDG_CACHE_HOME` overrides it everywhere."""
    home = Path.home()
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "sdsopt"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "sdsopt"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", home / "AppData" / "Local")) / "sdsopt" / "Cache"
    return home / ".cache" / "sdsopt"


def load_tensors(name: str) -> dict[str, torch.Tensor] | None:
    """Returns the tensors saved under that name, or None where there are none, or not whole ones."""
    path = cache_dir() / f"{name}.pt"
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception:  # a damaged file raises many kinds; it is made again
        return None
    return loaded if isinstance(loaded, dict) else None


def save_tensors(name: str, tensors: dict[str, torch.Tensor]) -> Path:
    """Saves tensors under a name; a reader sees the old file or the new one, never a part."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(tensors, file)
        Path(temporary).replace(folder / f"{name}.pt")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return folder / f"{name}.pt"
