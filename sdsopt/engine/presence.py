"""Whether all processes have gradients of the same factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdsopt.errors import UnequalGradientsError
from sdsopt.sharding import Distribution, Group, Turn

Presences = Sequence[tuple[str, Group, bool]]  # a factor's name, the processes that hold it, whether it has a gradient


class Presence:
    """Notices that a gradient is there on some processes only.

    What is exchanged is decided by the model, never by which gradients a process has: else processes would wait for
    each other for ever. A process without a gradient sends zeros, and with them word that it has none. On a CPU the
    words are read at once; on an accelerator, which they would hold up, at the next step. So all raise together.
    """

    def __init__(self) -> None:
        self._unread: tuple[Presences, list[Tensor], Any] | None = None

    def words(self, presences: Presences, like: Tensor | None) -> list[tuple[Distribution, Tensor]]:
        """Returns what to send along with the gradients: one row for each process, and all rows to every process.

        Args:
            presences: What this process has, of factors that all processes of the group list alike.
            like: A tensor of the dtype and device of the gradients.
        """
        self._read()
        if like is None:
            return []
        rows = (torch.tensor([[float(has) for has in of_group]]) for of_group in _by_group(presences).values())
        return [
            (Distribution(turn=Turn(group, group.size)), row.to(like).repeat(1, group.size))
            for group, row in zip(_by_group(presences), rows, strict=True)
        ]

    def check(self, presences: Presences, words: Sequence[Tensor]) -> None:
        """Compares what all processes have.

        Args:
            presences: As for `words`.
            words: What came of them, (w, k) for each group.

        Raises:
            UnequalGradientsError: Some have a gradient and others have not.
        """
        if not words:
            return
        device, event = words[0].device, None
        on_host = [word.to("cpu", non_blocking=True) for word in words]
        if device.type != "cpu":
            event = torch.get_device_module(device).Event()
            event.record()
        self._unread = presences, on_host, event
        if event is None:
            self._read()

    def _read(self) -> None:
        if self._unread is None:
            return
        presences, words, event = self._unread
        self._unread = None
        if event is not None:
            event.synchronize()
        names = {group: [name for name, of, _ in presences if of == group] for group in _by_group(presences)}
        for (group, factors), word in zip(names.items(), words, strict=True):
            for name, column in zip(factors, word.T.tolist(), strict=True):
                missing = [rank for rank, has in zip(group.ranks, column, strict=True) if not has]
                if 0 < len(missing) < group.size:
                    raise UnequalGradientsError(
                        f"process(es) {missing} of {list(group.ranks)} have no gradient of {name}, and the others have "
                        "one. The factor is sharded over them, so they must use the adapter in the same steps. Let "
                        "all of them run it, or add 0·(the sum of its parameters) to the loss where it is not run."
                    )


def _by_group(presences: Presences) -> dict[Group, list[bool]]:
    groups: dict[Group, list[bool]] = {}
    for _, group, has in presences:
        groups.setdefault(group, []).append(has)
    return groups
