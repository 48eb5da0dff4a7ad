"""Files in the safetensors format: 8 bytes with the header's length, a JSON header, and the tensors' bytes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from sdsopt.adapters.json_object import parse_object
from sdsopt.adapters.tensor_file import TensorFile, TensorInfo
from sdsopt.adapters.text import brief
from sdsopt.errors import AdapterError
from sdsopt.extras import extra

_LENGTH_BYTES = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@final
class SafetensorsFile(TensorFile):
    """A safetensors file, which the package `safetensors` has found to be valid.

    Args:
        path: A regular file.

    Raises:
        AdapterError: It is no valid safetensors file.
        MissingExtraError: safetensors is not installed.
    """

    def __init__(self, path: Path) -> None:
        with extra("cli"):
            from safetensors import SafetensorError, safe_open
        self.path = path
        self._errors = SafetensorError
        try:
            # Checks the header's length, the shapes, and that the tensors fill the file without gap or overlap.
            self._open: Any = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise AdapterError(
                f"{path} is no valid safetensors file ({brief(error)}); it is damaged or of another format, fetch it "
                "again"
            ) from error
        except RuntimeError as error:  # torch's, which maps the file into memory
            raise AdapterError(f"{path} cannot be opened ({brief(error)})") from error
        header, self._data_start = _read_header(path)
        self.metadata = header.pop("__metadata__", None) or {}
        self._offsets: dict[str, tuple[int, int]] = {name: entry["data_offsets"] for name, entry in header.items()}
        self.tensors = {
            name: TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"])) for name, entry in header.items()
        }

    def read(self, name: str) -> Tensor:
        try:
            return self._open.get_tensor(name)
        except (self._errors, RuntimeError) as error:
            raise AdapterError(f"{self.path}: cannot read {name!r} ({brief(error)})") from error

    def write(self, path: Path, replaced: Mapping[str, Tensor]) -> None:
        # All other bytes stay as they are: header, metadata, order, tensors of dtypes that torch does not know.
        shutil.copyfile(self.path, path)
        with path.open("r+b") as file:
            for name, tensor in replaced.items():
                begin, end = self._offsets[name]
                content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                assert len(content) == end - begin, name
                file.seek(self._data_start + begin)
                file.write(content)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header, and where the tensors' bytes begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        return parse_object(file.read(length), f"the header of {path}"), _LENGTH_BYTES + length
