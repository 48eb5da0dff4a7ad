"""Memory that a step fills, kept for the next one."""

# A storage's use count has no public name; torch's own CUDA graph trees read it so.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor


class Buffers:
    """One piece of memory for each parameter, on a CPU: the same one in every step.

    A C library gives large blocks back to the system once they are free, and the system hands them out anew page by
    page: for the gradients of an 8B model's adapters that took as long as correcting them. Other devices' allocators
    keep memory themselves.

    A copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}

    def keep(self, parameters: Container[int]) -> None:
        """Lets go of the memory of all parameters but these, given their ids."""
        self._kept = {parameter: kept for parameter, kept in self._kept.items() if id(parameter) in parameters}

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Returns a tensor like this one, of any content, in the parameter's memory unless somebody still holds that.

        Some optimizers, and some hooks, keep the gradient of a step for the next one.
        """
        if not self.keeps(tensor):
            return torch.empty_like(tensor)
        kept = self._kept.get(parameter)
        if kept is None or _layout(kept) != _layout(tensor) or _is_held(kept):
            kept = self._kept[parameter] = torch.empty_like(tensor)
        return kept.detach()  # another tensor on the same storage, so that the storage knows of all who hold it

    @staticmethod
    def keeps(tensor: Tensor) -> bool:
        """Tells whether memory like this tensor's is kept."""
        kept = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
        return kept and not torch.is_inference_mode_enabled()

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _is_held(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor itself, and `storage`
