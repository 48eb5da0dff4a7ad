"""How FSDP2 can shard LoRA factors so that correcting them costs least."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from torch import nn

from sdsopt.pairs import LoRAPair, require_pairs

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


def shard_placements(model: nn.Module | Iterable[LoRAPair], processes: int) -> Callable[[nn.Parameter], Shard | None]:
    """Returns a `shard_placement_fn` for `fully_shard` that cuts each A across its columns, not across its rank.

    ```python
    placement = sdsopt.shard_placements(model, processes=dist.get_world_size())
    for layer in model.layers:
        fully_shard(layer, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)
    ```

    A step then takes one small all-reduce, and no exchange of A and its gradient. Call it before the first
    `fully_shard`. Everything else is cut as FSDP2 does by itself.

    Args:
        model: The model that holds the LoRA layers, or the pairs themselves.
        processes: The number of processes that a parameter is cut among. FSDP2 cuts later axes only evenly, so an A
            whose columns it does not divide stays cut across its rank.

    Returns:
        A function from parameters to placements; None stands for FSDP2's own choice.

    Raises:
        NoPairsError: The model has no LoRA pair.
    """
    axes: dict[int, int] = {}
    for pair in require_pairs(model):
        A, B = pair.A, pair.B
        for factor, axes_of in ((A, pair.blocks.axes_A(A.ndim)), (B, pair.blocks.axes_B(B.ndim))):
            even = [axis for axis in axes_of.free if axis == 0 or factor.shape[axis] % processes == 0]
            if even:
                axes[id(factor)] = even[0]

    def placement(parameter: nn.Parameter) -> Shard | None:
        from torch.distributed.tensor import Shard

        axis = axes.get(id(parameter))
        return None if axis is None else Shard(axis)

    return placement
