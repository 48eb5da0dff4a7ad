"""Memory that a step fills, kept for the next one."""

from __future__ import annotations

from torch import Tensor, empty_like
from torch.compiler import is_compiling


class Buffers:
    """One tensor for each parameter, on a CPU: the same ones in every step.

    A C library gives large blocks back to the system once they are free, and the system hands them out anew page by
    page: for the gradients of an 8B model's adapters that took as long as correcting them. Other devices' allocators
    keep memory themselves.

    A copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._last: dict[Tensor, Tensor] = {}
        self._used: dict[Tensor, Tensor] = {}

    def start_step(self) -> None:
        """Lets go of what the step before did not use."""
        self._last, self._used = self._used, {}

    def like(self, tensor: Tensor, parameter: Tensor) -> Tensor:
        """Returns a tensor like this one, of any content, that is the parameter's own until the next step."""
        if tensor.device.type != "cpu" or is_compiling():
            return empty_like(tensor)
        kept = self._last.pop(parameter, None)
        if kept is None or _layout(kept) != _layout(tensor):
            kept = empty_like(tensor)
        self._used[parameter] = kept
        return kept

    def __reduce__(self) -> tuple[type[Buffers], tuple[()]]:
        return Buffers, ()


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
