"""Names and numbers as a person reads them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence


def printable(text: str) -> str:
    """Returns the text with everything escaped that could move a cursor, or that no terminal can encode."""
    return "".join(part if part.isprintable() else repr(part)[1:-1] for part in text)


def shown(value: float) -> str:
    """Returns about three digits of a number, with – for NaN."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value and not 0.01 <= value < 1e5:
        return f"{value:.0e}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def common_prefix(names: Sequence[str]) -> str:
    """Returns what all names begin with, up to a separator; nothing for a single name."""
    common = os.path.commonprefix(list(names)) if len(names) > 1 else ""  # noqa: RUF071  # names, not paths
    return re.sub(r"[^._]*$", "", common)
