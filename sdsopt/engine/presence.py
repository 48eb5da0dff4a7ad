"""Whether all processes have gradients of the same factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdsopt.errors import UnequalGradientsError
from sdsopt.sharding import Group

Presences = Sequence[tuple[str, Group, bool]]  # a factor's name, the processes that hold it, whether it has a gradient


class Presence:
    """Notices that a gradient is there on some processes only.

    What is exchanged is decided by the model, never by which gradients a process has: else processes would wait for
    each other for ever. A process without a gradient sends zeros, and the all-reduce of the step counts the others.
    On a CPU the counts are read at once; on an accelerator, which that would hold up, at the next step. So all raise
    together.
    """

    def __init__(self) -> None:
        self._unread: tuple[Presences, list[Tensor], Any] | None = None

    def parts(self, presences: Presences, like: Tensor) -> list[tuple[tuple[Group], Tensor]]:
        """Returns what to add up over the processes: a one for each gradient that is there.

        Args:
            presences: What this process has, of factors that all processes of a group list alike.
            like: A tensor of the dtype and device of what else is added up.

        Raises:
            UnequalGradientsError: At the step before, some had a gradient and others had not.
        """
        self._read()
        ones: dict[Group, list[float]] = defaultdict(list)
        for _, group, has in presences:
            ones[group].append(float(has))
        return [((group,), torch.tensor(of_group).to(like)) for group, of_group in ones.items()]

    def check(self, presences: Presences, counts: Sequence[Tensor]) -> None:
        """Compares what all processes have.

        Args:
            presences: As for `parts`.
            counts: What came of these.

        Raises:
            UnequalGradientsError: Some have a gradient and others have not.
        """
        if not counts:
            return
        device, event = counts[0].device, None
        on_host = [count.to("cpu", non_blocking=True) for count in counts]
        if device.type != "cpu":
            event = torch.get_device_module(device).Event()
            event.record()
        self._unread = presences, on_host, event
        if event is None:
            self._read()

    def _read(self) -> None:
        if self._unread is None:
            return
        presences, counts, event = self._unread
        self._unread = None
        if event is not None:
            event.synchronize()
        names: dict[Group, list[str]] = defaultdict(list)
        for name, group, _ in presences:
            names[group].append(name)
        for (group, of_group), found in zip(names.items(), counts, strict=True):
            for name, count in zip(of_group, found.tolist(), strict=True):
                if 0 < count < group.size:
                    raise UnequalGradientsError(
                        f"{count:.0f} of {group.size} processes have a gradient of {name}, and the others have none. "
                        "The factor is sharded over them, so they must use the adapter in the same steps. Let all of "
                        "them run it, or add 0·(the sum of its parameters) to the loss where it is not run."
                    )
