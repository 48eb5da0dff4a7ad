"""One process that takes itself for one of a thousand: torch's fake process group, whose collectives do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.optim import SGD

from bodies.common import counted
from costs import Pair
from sdsopt import LoRAPair, SDSPreconditioner
from sdsopt.engine.presence import Presence
from sdsopt.linalg import EighInverseRoot, InverseRoot, RootResult
from sdsopt.pairs import Groups


@dataclass(frozen=True)
class NoRoots(InverseRoot):
    """Nothing arrives, so there is nothing to decompose."""

    def reduce(self, factor: Tensor) -> Tensor:
        return EighInverseRoot().reduce(factor)

    def compute(self, reduced: Tensor, exponents: Sequence[float], damping: float) -> RootResult:
        return RootResult(tuple(torch.zeros_like(reduced) for _ in exponents), torch.zeros(len(reduced)))


def collectives(
    pairs: Sequence[Pair], correction: str, size: int, rank: int, dtype: torch.dtype, columns: bool
) -> list[tuple[str, int]]:
    """sdsopt's collectives in one step of FSDP2, with the bytes that the process hands over.

    Args:
        pairs: The shapes.
        correction: The correction.
        size: The number of processes.
        rank: Which of them this one takes itself for.
        dtype: The parameters' dtype.
        columns: Whether A is cut across its columns.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        # Named, since torch keeps equal meshes of earlier process groups in its caches.
        mesh = init_device_mesh("cpu", (size,), mesh_dim_names=(f"as {rank}",))
        found: list[LoRAPair] = []
        for index, pair in enumerate(pairs):
            layer = nn.Module()
            layer.register_parameter("A", _shard((pair.rank, pair.n), int(columns), mesh, dtype))
            layer.register_parameter("B", _shard((pair.m, pair.rank), 0, mesh, dtype))
            found.append(LoRAPair(str(index), layer, "", "A", "B", Groups(), lambda _: 1.0))
        inner = SGD([factor for pair in found for factor in (pair.A, pair.B)], lr=0.1)
        # No process answers, so no count of them can be right.
        with counted() as calls, mock.patch.object(Presence, "check"):
            SDSPreconditioner(inner, found, correction, inverse_root=NoRoots()).step()
        return calls
    finally:
        dist.destroy_process_group()


def _shard(shape: tuple[int, int], axis: int, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Parameter:
    """This process's part of a parameter, with a gradient."""
    local = list(shape)
    local[axis], _ = Shard.local_shard_size_and_offset(shape[axis], mesh.size(), mesh.get_rank())
    whole = DTensor.from_local(
        torch.zeros(local, dtype=dtype),
        mesh,
        [Shard(axis)],
        run_check=False,
        shape=torch.Size(shape),
        stride=(shape[1], 1),
    )
    parameter = nn.Parameter(whole)
    parameter.grad = torch.zeros_like(whole)
    return parameter
