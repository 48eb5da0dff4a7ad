"""What a LoRA pair is and where it is found. Knows nothing of optimizers."""

from sdsopt.pairs.blocks import BlockView, Experts, Groups, TransposedExperts, UnequalGroups
from sdsopt.pairs.find import find_pairs, register_layout, require_pairs
from sdsopt.pairs.layout import Layout, Skipped
from sdsopt.pairs.link import link, linked_pairs
from sdsopt.pairs.note import Note, read_note
from sdsopt.pairs.pair import LoRAPair, live
from sdsopt.pairs.pair_list import PairList

__all__ = [
    "BlockView",
    "Experts",
    "Groups",
    "Layout",
    "LoRAPair",
    "Note",
    "PairList",
    "Skipped",
    "TransposedExperts",
    "UnequalGroups",
    "find_pairs",
    "link",
    "linked_pairs",
    "live",
    "read_note",
    "register_layout",
    "require_pairs",
]
