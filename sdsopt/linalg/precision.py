"""In which precision the small matrices are computed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

_WITHOUT_FLOAT64 = {"mps"}


def accurate_dtype(device: torch.device) -> torch.dtype:
    """Returns float64 where the device has it, else float32.

    The Gram matrix squares the condition number: in float32 a factor with κ = 1e4 has no correct digit left.
    float64 is also out of reach of TF32 and of autocast.
    """
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


@contextmanager
def without_autocast(device_types: set[str]) -> Generator[None]:
    """Turns autocast off on these kinds of device, so that no product is silently rounded to bfloat16."""
    rest = {device_type for device_type in device_types if torch.amp.is_autocast_available(device_type)}
    if not rest:
        yield
        return
    with torch.autocast(rest.pop(), enabled=False), without_autocast(rest):
        yield
