"""Whether all processes have gradients of the same factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdsopt.errors import UnequalGradientsError
from sdsopt.sharding import Distribution, Group, Turn

Presences = Sequence[tuple[str, Group, bool]]  # a factor's name, the processes that hold it, whether it has a gradient


class Presence:
    """Notices that a gradient is there on some processes only.

    What is exchanged is decided by the model, never by which gradients a process has: else processes would wait for
    each other for ever. A process without a gradient sends zeros, and with them word that it has none. The word is
    read, which waits for the device, only if this process has other gradients than when it last read.
    """

    def __init__(self) -> None:
        self._last: Presences = ()

    def words(self, presences: Presences, like: Tensor | None) -> list[tuple[Distribution, Tensor]]:
        """Returns what to send along with the gradients: one row for each process, and all rows to every process.

        Args:
            presences: What this process has, of factors that all processes of the group list alike.
            like: A tensor of the dtype and device of the gradients.
        """
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
        if presences == self._last:
            return
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
        self._last = presences


def _by_group(presences: Presences) -> dict[Group, list[bool]]:
    groups: dict[Group, list[bool]] = {}
    for _, group, has in presences:
        groups.setdefault(group, []).append(has)
    return groups
