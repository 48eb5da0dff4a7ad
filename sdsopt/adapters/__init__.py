"""Adapters on disk: what they look like inside, and the same ΔW in better conditioned factors.

from sdsopt.adapters import inspect_adapter, rebalance_adapter

print(inspect_adapter("out/checkpoint-500").verdict.text)
rebalance_adapter("out/checkpoint-500", "out/balanced")
"""

from sdsopt.adapters.inspect import inspect_adapter
from sdsopt.adapters.rebalance import LayerChange, RebalancedLayer, RebalanceReport, rebalance_adapter
from sdsopt.adapters.report import AdapterReport, LayerReport, LayerStatus
from sdsopt.adapters.verdict import Level, Verdict

__all__ = [
    "AdapterReport",
    "LayerChange",
    "LayerReport",
    "LayerStatus",
    "Level",
    "RebalanceReport",
    "RebalancedLayer",
    "Verdict",
    "inspect_adapter",
    "rebalance_adapter",
]
