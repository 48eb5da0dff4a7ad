"""Checking the kinds of values that a user gives as options."""

from __future__ import annotations

from numbers import Integral, Real


def require_number(name: str, value: object, wanted: str) -> None:
    """Refuses what is no number: text as a configuration file has it, for example.

    Args:
        name: The option's name.
        value: What was given.
        wanted: What it must be, for the message.

    Raises:
        TypeError: It is none.
    """
    _require(Real, name, value, wanted)


def require_integer(name: str, value: object, wanted: str) -> None:
    """Refuses what is no integer; otherwise like `require_number`."""
    _require(Integral, name, value, wanted)


def _require(kind: type, name: str, value: object, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
