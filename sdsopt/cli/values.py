"""Argument values that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sdsopt.errors import SDSOptError

_T = TypeVar("_T")


class UsageError(SDSOptError, ValueError):
    """An argument has a value that cannot be used."""


def listed(kind: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """Returns a parser of values that are separated by commas."""

    def parse(text: str) -> list[_T]:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]

    parse.__name__ = f"list of {kind.__name__}"  # argparse's message names the type
    return parse
