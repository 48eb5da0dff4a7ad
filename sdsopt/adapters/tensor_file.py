"""What a file of named tensors is, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, or None for one that no factor may have: integers, float8 and the like.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None


FACTOR_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TensorFile(ABC):
    """A file of named tensors.

    Attributes:
        path: Where it is.
        tensors: What it holds, by name.
        metadata: The format's own texts beside the tensors.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Reads one tensor onto the CPU.

        Raises:
            AdapterError: It cannot be read.
        """

    @abstractmethod
    def write(self, path: Path, replaced: Mapping[str, Tensor]) -> None:
        """Writes a copy of the file in which some tensors have other values.

        Args:
            path: Where to; the file is created or overwritten.
            replaced: The new values by name, of the old shape and dtype.
        """
