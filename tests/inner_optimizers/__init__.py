"""Every optimizer that the tests put inside, one row each, package by package."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace

from .row import Inner, Table

PACKAGES = (
    "torch",
    "torch_optimizer",
    "pytorch_optimizer",
    "bitsandbytes",
    "torchao",
    "schedulefree",
    "prodigyopt",
    "transformers",
)


def _table(package: str) -> Table:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # packages warn while they are imported
        return importlib.import_module(f"{__name__}.of_{package}").TABLE


def _tables() -> dict[str, Table]:
    found: dict[str, Table] = {}
    for package in PACKAGES:
        try:
            found[package] = _table(package)
        except ImportError as error:
            if error.name != package:
                raise
    return found


TABLES = _tables()
"""Those of the packages that are installed."""

ALL = [replace(inner, name=f"{package}.{inner.name}") for package, table in TABLES.items() for inner in table.rows]

__all__ = ["ALL", "PACKAGES", "TABLES", "Inner", "Table"]
