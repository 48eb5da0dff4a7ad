"""Layers chosen by name."""

from __future__ import annotations

from fnmatch import fnmatchcase


def name_fits(name: str, pattern: str) -> bool:
    """Tells whether part of a name fits a pattern with the wildcards * and ?."""
    # Brackets stand for themselves: an adapter's name is written in them.
    return fnmatchcase(name, f"*{pattern.replace('[', '[[]')}*")
