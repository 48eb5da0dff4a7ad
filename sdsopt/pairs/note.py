"""What sdsopt remembers on a module or a parameter."""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class Note(Generic[T]):
    """An attribute value that stays behind when its holder is copied or pickled.

    A copy of a model is another model: it has no hooks, and its parameters belong to other pairs.

    Args:
        content: What to remember; None in a copy.
    """

    def __init__(self, content: T | None = None) -> None:
        self.content = content

    def __deepcopy__(self, memo: object) -> Note[T]:
        return Note()

    def __reduce__(self) -> tuple[type[Note[T]], tuple[()]]:
        return Note, ()
