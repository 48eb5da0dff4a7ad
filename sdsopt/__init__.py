"""Makes LoRA training behave more like full fine-tuning, by correcting gradients at the optimizer."""

from sdsopt._version import __version__
from sdsopt.constructors import SDSSGD, SDSAdamW
from sdsopt.corrections import (
    AltLoRA,
    Correction,
    Factors,
    GramPower,
    KeepNorm,
    PairTensors,
    TrackBasis,
    available_corrections,
    register_correction,
)
from sdsopt.hooks import Handle, attach
from sdsopt.linalg import InverseRoot
from sdsopt.optimizer import SDSPreconditioner
from sdsopt.pairs import Layout, LoRAPair, PairList, Skipped, find_pairs, link, linked_pairs, register_layout

__all__ = [
    "AltLoRA",
    "Correction",
    "Factors",
    "GramPower",
    "Handle",
    "InverseRoot",
    "KeepNorm",
    "Layout",
    "LoRAPair",
    "PairList",
    "PairTensors",
    "SDSAdamW",
    "SDSPreconditioner",
    "SDSSGD",
    "Skipped",
    "TrackBasis",
    "__version__",
    "attach",
    "available_corrections",
    "find_pairs",
    "link",
    "linked_pairs",
    "register_correction",
    "register_layout",
]
