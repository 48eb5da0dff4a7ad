"""Texts that every Python comes with."""

from __future__ import annotations

import ast
import importlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

_STDLIB = Path(sysconfig.get_paths()["stdlib"])
# Tests and vendored packages are not what the library's authors write like.
_LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}


@cache
def source_files() -> tuple[Path, ...]:
    """Returns the standard library's Python sources, sorted by path."""
    files = (path.relative_to(_STDLIB) for path in _STDLIB.rglob("*.py"))
    return tuple(sorted(_STDLIB / path for path in files if not _LEFT_OUT.intersection(path.parts)))


def python_sources() -> bytes:
    """Returns the sources, one after the other: some 10 MB of code."""
    return b"\n".join(path.read_bytes() for path in source_files())


def language_reference() -> bytes:
    """Returns the topics of Python's `help()`: half a megabyte of English prose with examples."""
    topics: Any = importlib.import_module("pydoc_data.topics")
    return "\n".join(text for _, text in sorted(topics.topics.items())).encode()


def docstrings() -> Iterator[tuple[str, str]]:
    """Yields (top-level package, docstring) for every documented definition of the standard library."""
    for path in source_files():
        package = path.relative_to(_STDLIB).parts[0].removesuffix(".py")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # sources that are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield package, text
