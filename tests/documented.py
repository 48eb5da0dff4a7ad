"""The code in README and docs, to be run."""

from __future__ import annotations

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


def execute(code: str, page: str, **names: Any) -> dict[str, Any]:
    """Runs a block with these names defined, and returns all that are defined then."""
    scope: dict[str, Any] = {"__name__": "documented", **names}
    exec(compile(code, page, "exec"), scope)
    return scope
