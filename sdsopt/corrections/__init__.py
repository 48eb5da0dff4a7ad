"""Gradient corrections: factors and gradients in, gradients out."""

from sdsopt.corrections.base import Correction, Factors, LearningRates, PairTensors
from sdsopt.corrections.gram_power import GramPower
from sdsopt.corrections.registry import available_corrections, make_correction, register_correction
from sdsopt.corrections.rescale import KeepNorm

__all__ = [
    "Correction",
    "Factors",
    "GramPower",
    "KeepNorm",
    "LearningRates",
    "PairTensors",
    "available_corrections",
    "make_correction",
    "register_correction",
]
