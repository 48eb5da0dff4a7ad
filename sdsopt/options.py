"""Checking the values that a user gives as options."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real


def require_number(name: str, value: float, wanted: str, holds: Callable[[float], bool]) -> None:
    """Refuses what is no number, such as text from a configuration file, or not the right one.

    Args:
        name: The option's name.
        value: What was given.
        wanted: What it must be, for the message.
        holds: Tells of a number whether it is that.

    Raises:
        TypeError: It is no number.
        ValueError: It is another one.
    """
    _require(Real, name, value, wanted, holds)


def require_integer(name: str, value: int, wanted: str, holds: Callable[[float], bool]) -> None:
    """Refuses what is no integer; otherwise like `require_number`."""
    _require(Integral, name, value, wanted, holds)


def _require(kind: type, name: str, value: float, wanted: str, holds: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}")
    if not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")
