"""Fills the pages' code blocks in from the examples: `python docs/make_snippets.py`.

A page holds the code itself, so that it can be read anywhere. Where a comment `<!-- examples/NAME.py:PART -->` stands
above a block, the block is what NAME.py has between `# docs: PART` and `# docs: end`, with the imports
that it needs.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- (examples/\w+\.py):(\w+) -->\n```python\n)(.*?)(```\n)", re.DOTALL)
PART = re.compile(r"^ *# docs: (\w+)\n(.*?)^ *# docs: end\n", re.DOTALL | re.MULTILINE)
PRAGMA = re.compile(r"  # pyright: ignore\[\w+\]")


def parts(example: str) -> dict[str, str]:
    """Returns each marked part of an example, as a reader would paste it."""
    tree = ast.parse(example)
    found: dict[str, str] = {}
    for name, code in PART.findall(example):
        code = PRAGMA.sub("", dedent(code).strip())
        imports = needed_imports(tree, code)
        gap = "\n\n\n" if code.startswith(("class ", "def ", "@")) else "\n\n"
        found[name] = f"{imports}{gap if imports else ''}{code}\n"
    return found


def needed_imports(example: ast.Module, code: str) -> str:
    """Returns the example's own imports of the names in `code`, grouped as they are there."""
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    lines: list[str] = []
    last = None
    for node in example.body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if last is not None and node.lineno > last + 1:
            lines.append("")  # the next group
        last = node.end_lineno
        for_this = [alias for alias in node.names if (alias.asname or alias.name.partition(".")[0]) in names]
        if for_this and isinstance(node, ast.ImportFrom):
            lines.append(ast.unparse(ast.ImportFrom(node.module, for_this, node.level)))
        elif for_this:
            lines.append(ast.unparse(ast.Import(for_this)))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def filled(page: str) -> str:
    """Returns the page with its blocks as the examples have them now."""

    def fill(block: re.Match[str]) -> str:
        start, example, part, _, end = block.groups()
        return start + parts((ROOT / example).read_text(encoding="utf8"))[part] + end

    return BLOCK.sub(fill, page)


if __name__ == "__main__":
    for path in (ROOT / "docs").rglob("*.md"):
        text = path.read_text(encoding="utf8")
        path.write_text(filled(text), encoding="utf8")
