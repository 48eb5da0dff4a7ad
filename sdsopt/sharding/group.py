"""Processes that communicate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def has_several_processes() -> bool:
    """Tells whether this process is one of several that communicate."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@final
@dataclass(frozen=True)
class Group:
    """One dimension of a device mesh, seen from this process.

    Meshes that were made apart but join the same processes compare equal, so what is sent over them travels together.

    Attributes:
        ranks: The global ranks, in the mesh's order.
        device_type: Where its collectives take tensors.
        process_group: torch's own.
    """

    ranks: tuple[int, ...]
    device_type: str
    process_group: dist.ProcessGroup = field(compare=False, repr=False)

    @classmethod
    def of(cls, mesh: DeviceMesh, dimension: int) -> Group:
        """Returns the group of this process along a dimension of a mesh."""
        group = mesh.get_group(dimension)
        return cls(tuple(dist.get_process_group_ranks(group)), mesh.device_type, group)

    def __hash__(self) -> int:
        return hash((self.ranks[0], len(self.ranks)))  # not of thousands of ranks, at each look-up

    @property
    def size(self) -> int:
        """The number of processes."""
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """The place of this process among them."""
        return dist.get_rank(self.process_group)

    def to_wire(self, tensor: Tensor) -> Tensor:
        """Moves a tensor to where collectives take it, in case that factors are offloaded to the CPU."""
        return tensor if tensor.device.type == self.device_type else tensor.to(self.device_type)
