"""Names and numbers as a person reads them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence


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


def brief(error: BaseException) -> str:
    """Returns what an error of another library says; it may quote megabytes of the file."""
    text = str(error)
    return text if len(text) <= 300 else f"{text[:300]}…"
