"""Finding pairs from parameters alone, for trainers that give an optimizer no model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from sdsopt.errors import NoPairsError
from sdsopt.pairs.find import require_pairs
from sdsopt.pairs.note import Note
from sdsopt.pairs.pair import LoRAPair

_NOTE = "_sdsopt_pair"


def link(model: nn.Module | Iterable[LoRAPair]) -> list[LoRAPair]:
    """Remembers on every LoRA factor which pair it belongs to, so that `linked_pairs` finds it without the model.

    Call it once the adapters are in place, before the trainer builds its optimizer. Copies of the model are not
    linked; linking again replaces what was remembered.

    ```python
    sdsopt.link(model)
    optimizer = sdsopt.SDSAdamW(model.parameters(), lr=2e-4)
    ```

    Args:
        model: The model that holds the LoRA layers, or the pairs themselves.

    Returns:
        The pairs, those of frozen adapters included.

    Raises:
        NoPairsError: There is none.
    """
    pairs = require_pairs(model)
    for pair in pairs:
        for factor in (pair.A, pair.B):
            setattr(factor, _NOTE, Note(pair))
    return pairs


def linked_pairs(parameters: Iterable[Tensor]) -> list[LoRAPair]:
    """Returns the pairs that these parameters were linked to, each once, in the parameters' order.

    Args:
        parameters: Parameters of a model that went through `link`; others are passed over.

    Raises:
        NoPairsError: None of them was linked.
    """
    parameters = list(parameters)
    notes: Iterable[Note[LoRAPair] | None] = (getattr(parameter, _NOTE, None) for parameter in parameters)
    pairs = {note.content: None for note in notes if note is not None and note.content is not None}
    if not pairs:
        raise NoPairsError(
            f"none of the {len(parameters)} parameters is linked to a LoRA pair. Call sdsopt.link(model) after adding "
            "the adapters and before building the optimizer; or give SDSPreconditioner the model."
        )
    return list(pairs)
