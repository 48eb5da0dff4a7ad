"""Gradient corrections: factors and gradients in, gradients out."""

from sdsopt.corrections.altlora import AltLoRA
from sdsopt.corrections.base import Correction, Factors, LearningRates, PairTensors
from sdsopt.corrections.gram_power import GramPower
from sdsopt.corrections.registry import available_corrections, make_correction, register_correction
from sdsopt.corrections.rescale import KeepNorm
from sdsopt.corrections.row_map import Lengths, RowMap
from sdsopt.corrections.track_basis import TrackBasis, basis_change

__all__ = [
    "AltLoRA",
    "Correction",
    "Factors",
    "GramPower",
    "KeepNorm",
    "LearningRates",
    "Lengths",
    "PairTensors",
    "RowMap",
    "TrackBasis",
    "available_corrections",
    "basis_change",
    "make_correction",
    "register_correction",
]
