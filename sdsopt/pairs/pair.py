"""What a LoRA pair is: where its two factors live, and how to look at them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, nn

from sdsopt.errors import PairShapeError, StaleParametersError
from sdsopt.pairs.blocks import BlockView


@dataclass(frozen=True, eq=False)
class LoRAPair:
    """A low-rank weight update ΔW = scaling · B · A, as an address rather than as tensors.

    FSDP2, ``load_state_dict(assign=True)`` and ``.to("meta")`` put new Parameters in place of the old ones, so the
    factors are looked up in the module each time they are asked for.

    Attributes:
        name: Module path and adapter, e.g. ``model.layers.0.self_attn.q_proj[default]``.
        module: The layer that holds both factors.
        adapter: The adapter's name.
        path_A: Dotted path of A below `module`, e.g. ``lora_A.default.weight``.
        path_B: Dotted path of B below `module`.
        blocks: How the stored factors are seen as independent products.
        read_scaling: Returns the factor in front of B · A, given the module.
        path_E: Dotted path of the diagonal of ΔW = scaling · B · diag(E) · A (AdaLoRA); None for a plain product.
    """

    name: str
    module: nn.Module
    adapter: str
    path_A: str
    path_B: str
    blocks: BlockView
    read_scaling: Callable[[nn.Module], float]
    path_E: str | None = None

    @property
    def address(self) -> tuple[int, str, str]:
        """What two pairs have in common if they are one and the same: the module's `id`, and both paths."""
        return id(self.module), self.path_A, self.path_B

    @property
    def A(self) -> nn.Parameter:
        """The module's present A, in the shape it is stored in.

        Raises:
            StaleParametersError: There is no parameter at `path_A` any more.
        """
        return self._resolve("A", self.path_A)

    @property
    def B(self) -> nn.Parameter:
        """The module's present B, in the shape it is stored in.

        Raises:
            StaleParametersError: There is no parameter at `path_B` any more.
        """
        return self._resolve("B", self.path_B)

    @property
    def E(self) -> nn.Parameter | None:
        """The module's present diagonal between B and A, r numbers in any shape; None for a plain product.

        Raises:
            StaleParametersError: There is no parameter at `path_E` any more.
        """
        return None if self.path_E is None else self._resolve("E", self.path_E)

    @property
    def scaling(self) -> float:
        """The factor in front of B · A at present, such as α/r.

        Raises:
            StaleParametersError: The module has no scaling for the adapter any more.
        """
        try:
            return float(self.read_scaling(self.module))
        except (AttributeError, KeyError) as error:
            raise StaleParametersError(f"the scaling of {self.name} is gone: {_WHY_GONE}") from error

    @property
    def rank(self) -> int:
        """The rank r of each block."""
        return self.blocks.shape_A(whole_shape(self.A))[1]

    @property
    def num_blocks(self) -> int:
        """The number e of independent products."""
        return self.blocks.num_blocks

    @property
    def trainable(self) -> bool:
        """Whether at least one of the factors requires a gradient."""
        A, B = self.A, self.B  # both, so that a missing factor never goes unnoticed
        return A.requires_grad or B.requires_grad

    def split_A(self, tensor: Tensor) -> Tensor:
        """Returns A, or a tensor of its shape, as (e, r, n)."""
        return self.blocks.split_A(tensor)

    def split_B(self, tensor: Tensor) -> Tensor:
        """Returns B, or a tensor of its shape, as (e, m, r)."""
        return self.blocks.split_B(tensor)

    def join_A(self, blocks: Tensor) -> Tensor:
        """Returns blocks (e, r, n) as a contiguous tensor of A's shape."""
        return self.blocks.join_A(blocks, self.A.shape)

    def join_B(self, blocks: Tensor) -> Tensor:
        """Returns blocks (e, m, r) as a contiguous tensor of B's shape."""
        return self.blocks.join_B(blocks, self.B.shape)

    def check(self) -> None:
        """Makes sure that the two factors can be multiplied.

        Raises:
            PairShapeError: They cannot, or are no whole matrices; says their shapes and what most likely happened.
            StaleParametersError: A factor is gone.
        """
        A, B = self.A, self.B
        shape_A, shape_B = whole_shape(A), whole_shape(B)
        if any(len(shape) < 2 or 0 in shape for shape in (shape_A, shape_B)):
            raise PairShapeError(
                f"the factors of {self.name} are not whole matrices: A is {shape_A}, B is {shape_B}. {WHY_NOT_WHOLE}"
            )
        blocks_A, blocks_B = self.blocks.shape_A(shape_A), self.blocks.shape_B(shape_B)
        uneven = not (self.blocks.divides_A(shape_A) and self.blocks.divides_B(shape_B))
        if uneven or blocks_A[1] != blocks_B[2]:
            raise PairShapeError(
                f"the factors of {self.name} do not fit together: A is {shape_A}, B is {shape_B}, so in "
                f"{self.num_blocks} block(s) the ranks are {blocks_A[1]} and {blocks_B[2]}"
                f"{' with a remainder' if uneven else ''}. Most likely one factor was resized, or loaded from an "
                "adapter of another rank."
            )

    def _resolve(self, side: str, path: str) -> nn.Parameter:
        try:
            found: object = attrgetter(path)(self.module)
        except AttributeError:
            found = None
        if not isinstance(found, nn.Parameter):
            raise StaleParametersError(f"factor {side} of {self.name} is gone ({path} is no parameter): {_WHY_GONE}")
        return found


_WHY_GONE = "the adapter was deleted or merged away, or the layer was replaced. Call find_pairs(model) again."


WHY_NOT_WHOLE = (
    "Most likely FSDP1 flattened and sharded them. Use FSDP2 (torch.distributed.fsdp.fully_shard; with Accelerate, "
    "fsdp_version: 2), whose shards are corrected where they lie, or FSDP1's NO_SHARD."
)


def live(pairs: Iterable[LoRAPair]) -> Iterator[tuple[LoRAPair, nn.Parameter, nn.Parameter]]:
    """Yields the pairs that are still in their models, with their present A and B; others' adapters were deleted."""
    for pair in pairs:
        try:
            yield pair, pair.A, pair.B
        except StaleParametersError:
            continue


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape; DeepSpeed ZeRO-3 leaves an empty one, with the true one beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
