"""Makes LoRA training behave more like full fine-tuning, by correcting gradients at the optimizer."""

from sdsopt._version import __version__
from sdsopt.constructors import SDSSGD, SDSAdamW
from sdsopt.corrections import (
    AltLoRA,
    Correction,
    Factors,
    GramPower,
    KeepNorm,
    LearningRates,
    Lengths,
    PairTensors,
    RowMap,
    TrackBasis,
    available_corrections,
    register_correction,
)
from sdsopt.hooks import Handle, attach
from sdsopt.linalg import InverseRoot, use_native_products
from sdsopt.lora_plus import lora_plus_groups
from sdsopt.optimizer import SDSPreconditioner
from sdsopt.pairs import Layout, LoRAPair, PairList, Skipped, find_pairs, link, linked_pairs, register_layout
from sdsopt.placements import shard_placements
from sdsopt.recorder import Recorder

__all__ = [
    "AltLoRA",
    "Correction",
    "Factors",
    "GramPower",
    "Handle",
    "InverseRoot",
    "KeepNorm",
    "Layout",
    "LearningRates",
    "Lengths",
    "LoRAPair",
    "PairList",
    "PairTensors",
    "Recorder",
    "RowMap",
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
    "lora_plus_groups",
    "register_correction",
    "register_layout",
    "shard_placements",
    "use_native_products",
]
