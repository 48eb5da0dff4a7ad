"""The inverse-root methods by name."""

from __future__ import annotations

from sdsopt.linalg.auto import AutoInverseRoot
from sdsopt.linalg.base import InverseRoot
from sdsopt.linalg.eigh import EighInverseRoot
from sdsopt.linalg.newton_schulz import NewtonSchulzInverseRoot
from sdsopt.linalg.svd import SVDInverseRoot

_METHODS: dict[str, type[InverseRoot]] = {
    "auto": AutoInverseRoot,
    "eigh": EighInverseRoot,
    "svd": SVDInverseRoot,
    "newton_schulz": NewtonSchulzInverseRoot,
}


def available_inverse_roots() -> tuple[str, ...]:
    """Returns the names that `make_inverse_root` knows."""
    return tuple(_METHODS)


def make_inverse_root(method: str | InverseRoot) -> InverseRoot:
    """Returns the method of that name, or the given method itself.

    Raises:
        ValueError: No method has that name.
    """
    if isinstance(method, InverseRoot):
        return method
    if method not in _METHODS:
        raise ValueError(f"unknown inverse root {method!r}; known: {', '.join(_METHODS)}")
    return _METHODS[method]()
