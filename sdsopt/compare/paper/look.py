"""One look for each method throughout the report of the claims."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdsopt.extras import extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours that the comparison's own figures give these methods beside full fine-tuning. Dashes and markers, since
# sds-split and scaled often lie on each other.
LOOK: Mapping[str, Mapping[str, Any]] = {
    "lora": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "sds": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "sds-split": {"color": "#009E73", "marker": "D", "linestyle": "-."},
    "scaled": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
}


def new_figure() -> Figure:
    """Returns an empty figure. Needs the extra `demo`."""
    with extra("demo"):
        from matplotlib.figure import Figure
    return Figure(layout="constrained", dpi=150)
