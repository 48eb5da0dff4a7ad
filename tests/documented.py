"""The code in README and docs, to be run."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def blocks(page: str, heading: str | None = None) -> list[str]:
    """Returns the Python blocks of a page, or of the part under one of its headings."""
    text = (ROOT / page).read_text(encoding="utf8")
    if heading is not None:
        # Up to the next heading; a single # may be a comment in a block.
        [text] = re.findall(rf"^{heading}\n(.*?)(?=^##|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def undefined(code: str) -> set[str]:
    """Returns the names that a block uses and does not define, but for Python's own."""
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return used - defined(code) - imported(code) - set(dir(builtins))


def defined(code: str) -> set[str]:
    """Returns the names that a block gives a value."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {node.arg for node in nodes if isinstance(node, ast.arg)}


def imported(code: str) -> set[str]:
    """Returns the names that a block imports."""
    aliases = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.alias)]
    return {alias.asname or alias.name.partition(".")[0] for alias in aliases}


def execute(code: str, page: str, **names: Any) -> dict[str, Any]:
    """Runs a block with these names defined, and returns all that are defined then."""
    scope: dict[str, Any] = {"__name__": "documented", **names}
    exec(compile(code, page, "exec"), scope)
    return scope
