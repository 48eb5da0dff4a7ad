"""Gradient corrections: factors and gradients in, gradients out."""

from sdsopt.corrections.base import Correction, Factors, PairTensors
from sdsopt.corrections.gram_power import GramPower
from sdsopt.corrections.registry import available_corrections, make_correction, register_correction
from sdsopt.corrections.rescale import KeepNorm
from sdsopt.corrections.row_map import Lengths, RowMap

__all__ = [
    "Correction",
    "Factors",
    "GramPower",
    "KeepNorm",
    "Lengths",
    "PairTensors",
    "RowMap",
    "available_corrections",
    "make_correction",
    "register_correction",
]
