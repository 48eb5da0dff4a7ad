"""Memory that a step fills, kept for the next one."""

# A storage's use count has no public name; torch's own CUDA graph trees read it so.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch
from torch import Tensor


class Buffers:
    """Hands out tensors on a CPU whose memory is the same in every step, unless somebody still holds it.

    A C library gives large blocks back to the system once they are free, and the system hands them out anew page by
    page: for the gradients of an 8B model's adapters that took as long as correcting them. Other devices' allocators
    keep memory themselves.

    A copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, list[Tensor]] = defaultdict(list)
        self._handed_out: dict[Hashable, int] = defaultdict(int)  # in this round
        self._needed: dict[Hashable, int] = defaultdict(int)  # in this step

    def start_step(self) -> None:
        """Lets go of what the last step had no need of."""
        for layout, kept in list(self._kept.items()):
            del kept[self._needed[layout] :]
        self._needed.clear()
        self.start_round()

    def start_round(self) -> None:
        """Begins again with the first tensors: part of what the step has filled is not needed any more."""
        self._handed_out.clear()

    def empty_like(self, tensor: Tensor, /, *, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a tensor of the same shape and strides, of the same dtype unless one is given, and of any content.

        Some optimizers, and some hooks, keep the gradient of a step for the next one: their memory is left to them.
        """
        if tensor.device.type != "cpu" or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return torch.empty_like(tensor, dtype=dtype)
        layout = tensor.shape, tensor.stride(), dtype or tensor.dtype
        kept, index = self._kept[layout], self._handed_out[layout]
        while index and not _is_held(kept[index - 1]):
            index -= 1  # it was for a moment only
        if index == len(kept):
            kept.append(torch.empty_like(tensor, dtype=dtype))
        elif _is_held(kept[index]):
            kept[index] = torch.empty_like(tensor, dtype=dtype)
        self._handed_out[layout] = index + 1
        self._needed[layout] = max(index + 1, self._needed[layout])
        return kept[index].detach()  # another tensor on the same storage, so that the storage knows of all who hold it

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()


def _is_held(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    # Or another process holds it, or somebody has freed it.
    if storage.is_shared() or storage.nbytes() != tensor.nbytes:
        return True
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor itself, and `storage`
