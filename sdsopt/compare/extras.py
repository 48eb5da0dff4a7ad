"""The one place that knows the `demo` extra: what it holds, and what to say when it is not installed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from sdsopt.errors import SDSOptError

_DEMO_PACKAGES = frozenset({"peft", "transformers", "sklearn", "matplotlib", "rich"})


class MissingExtraError(SDSOptError, ImportError):
    """A package of an optional extra is not installed."""


@contextmanager
def demo_extra() -> Generator[None]:
    """Wraps the imports of optional packages, to turn a missing one into advice.

    Raises:
        MissingExtraError: A package of the extra is missing. Any other import error passes unchanged.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _DEMO_PACKAGES:
            raise
        raise MissingExtraError(f"this needs {package}, which is not installed: pip install 'sdsopt[demo]'") from error
