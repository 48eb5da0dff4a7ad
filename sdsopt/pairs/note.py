"""What sdsopt remembers on a module or a parameter."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar, final

T = TypeVar("T")


@final
class Note(Generic[T]):
    """An attribute value that stays behind when its holder is copied or pickled.

    A copy of a model is another model: it has no hooks, and its parameters belong to other pairs.

    Args:
        content: What to remember.
    """

    def __init__(self, content: T) -> None:
        self.content = content

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[OrderedDict[Any, Any]], tuple[()]]:
        # An empty one, for a file of saved Parameters to pass torch.load(weights_only=True) without knowing sdsopt.
        return OrderedDict, ()


def read_note(holder: object, name: str) -> Any:
    """Returns the content of the note that the holder has under that name; None if it has none."""
    note: object = getattr(holder, name, None)
    return note.content if isinstance(note, Note) else None
