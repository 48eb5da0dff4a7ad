"""Packages that a test needs and that may be missing."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest


def package(name: str) -> Any:
    """Imports a package or one of its modules, or skips the test.

    One that is installed but broken beside the others counts as missing.
    """
    if name.partition(".")[0] == "torchtune":
        _put_nf4_where_torchtune_looks()
    return pytest.importorskip(name, exc_type=ImportError)


def _put_nf4_where_torchtune_looks() -> None:
    """torchtune 0.6.1, the last release, imports NF4 by a name that torchao has given up."""
    old, new = "torchao.dtypes.nf4tensor", "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
    if old in sys.modules:
        return
    for name in (old, new):
        try:
            sys.modules[old] = importlib.import_module(name)
        except ImportError:
            continue
        return
