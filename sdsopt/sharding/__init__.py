"""Matrices that lie on several processes: where, and how to compute with them. Knows nothing of LoRA."""

from sdsopt.sharding.axes import Axes
from sdsopt.sharding.distribution import WHOLE, Distribution, is_distributed, whole
from sdsopt.sharding.exchange import collect, spread
from sdsopt.sharding.group import Group, has_several_processes
from sdsopt.sharding.sums import add_up, merge
from sdsopt.sharding.turn import Turn

__all__ = [
    "WHOLE",
    "Axes",
    "Distribution",
    "Group",
    "Turn",
    "add_up",
    "collect",
    "has_several_processes",
    "is_distributed",
    "merge",
    "spread",
    "whole",
]
