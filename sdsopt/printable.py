"""Text from files that nobody vouches for, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """Returns the text with everything escaped that could move a cursor, or that no terminal can encode."""
    return "".join(part if part.isprintable() else repr(part)[1:-1] for part in text)
