"""Puts a report of `sdsopt compare paper` into the documentation: `python docs/make_paper.py DIR`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
MARK = "<!-- below: docs/make_paper.py -->\n"


def main(results: Path) -> None:
    page = DOCS / "paper.md"
    introduction = page.read_text(encoding="utf8").partition(MARK)[0]
    measured = (results / "paper.md").read_text(encoding="utf8").replace("](paper-", "](img/paper-")
    page.write_text(introduction + MARK + "\n" + measured, encoding="utf8")
    for figure in results.glob("paper-*.svg"):
        shutil.copy(figure, DOCS / "img" / figure.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
