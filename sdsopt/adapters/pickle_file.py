"""Pickled state dicts, which are only opened on demand and never run code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sdsopt.adapters.tensor_file import FACTOR_DTYPES, TensorFile, TensorInfo
from sdsopt.adapters.text import brief
from sdsopt.errors import AdapterError

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt"})


@final
class PickleFile(TensorFile):
    """A state dict that `torch.save` wrote, by itself or under the key `state_dict` (Lightning).

    Args:
        path: A regular file. It is loaded with `weights_only=True`.

    Raises:
        AdapterError: It holds anything but tensors and plain containers, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = _load(path)
        nested = self._content.get("state_dict")
        self._values: dict[str, Any] = nested if isinstance(nested, dict) else self._content
        found = {name: value for name, value in self._values.items() if isinstance(value, Tensor)}
        self.tensors = {
            name: TensorInfo(tuple(value.shape), value.dtype if _is_plain(value) else None)
            for name, value in found.items()
        }
        self.metadata = {}

    def read(self, name: str) -> Tensor:
        return self._values[name].detach()

    def write(self, path: Path, replaced: Mapping[str, Tensor]) -> None:
        kept = dict(self._values)
        try:
            self._values.update(replaced)
            with path.open("wb") as file:  # torch's own writer takes no path without a suffix
                torch.save(self._content, file)
        finally:
            self._values.update(kept)


def _is_plain(tensor: Tensor) -> bool:
    # Sparse tensors and those without data are in a pickle's power, too.
    return tensor.dtype in FACTOR_DTYPES and tensor.layout is torch.strided and tensor.device.type == "cpu"


def _load(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols and legacy formats
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{path} holds more than tensors, and could run code if it were loaded; ask for a safetensors file"
        ) from error
    except Exception as error:  # torch's readers raise what they like on damaged files
        raise AdapterError(f"{path} cannot be loaded ({brief(error)}); it is damaged, fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise AdapterError(f"{path} holds no state dict, that is no dictionary from names to tensors")
    return content
