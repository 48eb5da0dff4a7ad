"""Where the entries of one factor are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, cast, final

from torch import Tensor

from sdsopt.sharding.axes import Axes
from sdsopt.sharding.group import Group
from sdsopt.sharding.turn import Turn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Tensor) -> bool:
    """Tells whether it is a DTensor, without importing what only these need."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor: itself, or a DTensor gathered, for which all processes must call this."""
    return cast("DTensor", tensor).full_tensor() if is_distributed(tensor) else tensor


@final
@dataclass(frozen=True, eq=False)
class Distribution:
    """How a factor lies on the processes, and how one computes with it there.

    Attributes:
        like: The parameter, a DTensor; None for a plain tensor, which is whole on this process.
        sums: Groups over whose processes its rows are cut: what is a sum over rows must be added up over them.
        batch: Groups over whose processes its blocks are cut.
        turn: How to make whole the axis that must be whole, where that is cut; None where it is not.
        turned_axis: That axis, 0 or 1.
        gathered: Whether to compute with the whole factor on every process, which costs the most.
    """

    like: DTensor | None = None
    sums: tuple[Group, ...] = ()
    batch: tuple[Group, ...] = ()
    turn: Turn | None = None
    turned_axis: int = 0
    gathered: bool = False

    @classmethod
    def of(cls, parameter: Tensor, axes: Axes) -> Distribution:
        """Reads it off a parameter.

        Args:
            parameter: A plain tensor or a DTensor (ndim ≥ 2).
            axes: What the parameter's axes mean.
        """
        if not is_distributed(parameter):
            return WHOLE
        like = cast("DTensor", parameter)
        mesh = like.device_mesh
        cuts = {
            Group.of(mesh, dimension): placement
            for dimension, placement in enumerate(like.placements)
            if mesh.size(dimension) > 1 and not placement.is_replicate()
        }
        axis_of = {group: cast("int | None", getattr(placement, "dim", None)) for group, placement in cuts.items()}
        sums = tuple(group for group, axis in axis_of.items() if axis in axes.free)
        batch = tuple(group for group, axis in axis_of.items() if axis in axes.batch)
        across = [group for group in cuts if group not in (*sums, *batch)]
        if not across:
            return cls(like, sums, batch)
        axis = axis_of[across[0]]
        # Turning moves rows to all other axes, which must be free then.
        turnable = cuts[across[0]].is_shard() and len(axes.free) == like.ndim - 1
        if axis not in (0, 1) or len(across) > 1 or not turnable:
            return cls(like, gathered=True)
        return cls(like, (*sums, *across), batch, Turn(across[0], like.shape[axis]), axis)

    def whole(self) -> Distribution:
        """The same factor, to be gathered."""
        return self if self.is_whole else Distribution(self.like, gathered=True)

    @property
    def is_whole(self) -> bool:
        """Whether one computes with it as if there were one process."""
        return not (self.sums or self.batch)

    @property
    def is_exchanged(self) -> bool:
        """Whether one computes with a copy that came from other processes, and not with what is stored."""
        return self.gathered or self.turn is not None

    def local(self, tensor: Tensor) -> Tensor:
        """Returns this process's part of the factor, or of a tensor of its shape.

        It shares memory with the tensor, unless that is cut in another way.
        """
        if self.like is None:
            return tensor
        distributed = cast("DTensor", tensor)
        if distributed.placements != self.like.placements:
            distributed = distributed.redistribute(placements=self.like.placements)
        return distributed.to_local()

    def wrap(self, local: Tensor) -> Tensor:
        """Inverse of `local`."""
        like = self.like
        if like is None:
            return local
        return type(like).from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def gather(self, local: Tensor) -> Tensor:
        """Returns the whole of a tensor, of which `local` is this process's part."""
        return whole(self.wrap(local))

    def cut(self, tensor: Tensor) -> Tensor:
        """Inverse of `gather`; does not communicate."""
        from torch.distributed.tensor import DTensor, Replicate

        assert self.like is not None
        mesh = self.like.device_mesh
        everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=self.like.placements).to_local()

    def to_rows(self, local: Tensor) -> Tensor:
        """Views a part as the rows of a matrix, (r_i, n), along the axis to turn."""
        return local.movedim(self.turned_axis, 0).flatten(1)

    def from_rows(self, rows: Tensor) -> Tensor:
        """Inverse of `to_rows`; takes off the columns that turning added at the end."""
        assert self.like is not None
        moved = self.like.to_local().movedim(self.turned_axis, 0)
        return rows[:, : prod(moved.shape[1:])].reshape(moved.shape).movedim(0, self.turned_axis)


WHOLE = Distribution()
