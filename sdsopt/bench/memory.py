"""How much memory a call takes on top of what is there already."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Runs a function and returns the most bytes of tensors that it held at once, beside those from before.

    Args:
        function: What to run. A tensor that it frees counts against those that it allocates.
        device: "cpu", where torch's allocator is watched, or a CUDA device, whose own statistics are read.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    results: Any = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    assert results is not None
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate((size for _, size in sorted(changes)), initial=0))
