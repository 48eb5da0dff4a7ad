"""Finding pairs from parameters alone, for trainers that give an optimizer no model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from sdsopt.errors import NoPairsError
from sdsopt.pairs.find import require_pairs
from sdsopt.pairs.note import Note, read_note
from sdsopt.pairs.pair import LoRAPair

_NOTE = "_sdsopt_model"


def link(model: nn.Module | Iterable[LoRAPair]) -> list[LoRAPair]:
    """Remembers on every LoRA factor which model it belongs to, so that `linked_pairs` finds its pairs.

    Call it once the adapters are in place, before the trainer builds its optimizer. Copies of the model are not
    linked; linking again replaces what was remembered.

    ```python
    sdsopt.link(model)
    optimizer = sdsopt.SDSAdamW(model.parameters(), lr=2e-4)
    ```

    Args:
        model: The model that holds the LoRA layers, or the pairs themselves.

    Returns:
        The pairs at present, those of frozen adapters included.

    Raises:
        NoPairsError: There is none.
        TypeError: `model` is neither a module nor a collection of pairs.
    """
    # The model and not its pairs: an adapter that is added before the optimizer is built shall be corrected too.
    pairs = require_pairs(model)
    source = model if isinstance(model, nn.Module) else tuple(pairs)
    for pair in pairs:
        for factor in (pair.A, pair.B):
            setattr(factor, _NOTE, Note(source))
    return pairs


def linked_pairs(parameters: Iterable[Tensor]) -> list[LoRAPair]:
    """Returns the pairs of the models that these parameters were linked to, frozen ones included.

    So an optimizer knows from them what it would know from the model.

    Args:
        parameters: Parameters of one or more models that went through `link`; others are passed over.

    Returns:
        The pairs as they are now, each once, in the order of the models' modules.

    Raises:
        NoPairsError: None of the parameters was linked.
    """
    parameters = list(parameters)
    sources = {id(source): source for p in parameters if (source := read_note(p, _NOTE)) is not None}
    if not sources:
        raise NoPairsError(
            f"none of the {len(parameters)} parameters is linked to a LoRA pair. Call sdsopt.link(model) after adding "
            "the adapters and before building the optimizer; or give SDSPreconditioner the model."
        )
    # A model and a part of it may both have been linked.
    return require_pairs(pair for source in sources.values() for pair in require_pairs(source))
