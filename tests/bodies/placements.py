"""Pairs of every block view, whose factors lie on the processes in every way."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import oracle
from recorder import Recorder
from sdsopt import LoRAPair, SDSPreconditioner
from sdsopt.corrections import Correction, Factors, GramPower, PairTensors
from sdsopt.pairs import BlockView, Experts, Groups, TransposedExperts, UnequalGroups

VIEWS: dict[str, tuple[BlockView, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (Groups(), (3, 10), (9, 3)),
    "convolution": (Groups(), (4, 3, 2, 2), (5, 4, 1, 1)),
    "grouped": (Groups(2), (6, 7), (8, 3)),
    "unequal": (UnequalGroups((5, 2)), (4, 6), (7, 2)),
    "experts": (Experts(3), (6, 5), (7, 6)),
    "transposed experts": (TransposedExperts(5), (5, 6, 2), (5, 2, 4)),
}

WAYS: dict[str, Placement | None] = {"plain": None, "whole": Replicate(), "axis 0": Shard(0), "axis 1": Shard(1)}


class WholeMatrices(Correction):
    """`sds` for one who does not know that it works row by row, so that factors must be gathered."""

    gram_exponents = (0.5,)

    def precondition(self, factors: Factors, gradients: PairTensors) -> PairTensors:
        polar = factors.B @ factors.roots_B[0.5]  # sees the whole of B
        assert polar.shape[-2:] == factors.B.shape[-2:]
        return GramPower(0.5).precondition(factors, gradients)


class Layer(nn.Module):
    def __init__(self, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)


def errors(correction: str) -> dict[str, float]:
    """The relative errors of the corrected gradients, for each way in which the factors lie."""
    meshes = [init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))]
    found: dict[str, float] = {}
    for (name, (view, *shapes)), mesh in product(VIEWS.items(), meshes):
        tensors = _tensors(shapes)
        for way_A, way_B in _ways(mesh):
            where = f"{name} on {mesh.ndim} dimension(s), A {way_A}, B {way_B}"
            found[where] = _error(view, tensors, mesh, (way_A, way_B), correction)
    return found


def _tensors(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """A, B and their gradients."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (*shapes, *shapes)]


def _ways(mesh: DeviceMesh) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """In one dimension all combinations; in two, all of A with some of B and the other way round."""
    if mesh.ndim == 1:
        yield from product(product(WAYS), product(WAYS))
        return
    ways = list(product([name for name in WAYS if name != "plain"], repeat=2))
    for way in ways:
        yield way, ("axis 0", "axis 0")
        yield ("whole", "axis 1"), way


def _place(tensor: Tensor, mesh: DeviceMesh, way: tuple[str, ...]) -> Tensor:
    placements = [WAYS[name] for name in way]
    if None in placements:
        return tensor.clone()
    return distribute_tensor(tensor, mesh, [p for p in placements if p is not None], src_data_rank=None)


def _error(
    view: BlockView, tensors: list[Tensor], mesh: DeviceMesh, ways: tuple[tuple[str, ...], ...], correction: str
) -> float:
    pairs: list[LoRAPair] = []
    for place in (lambda tensor, way: tensor.clone(), lambda tensor, way: _place(tensor, mesh, way)):
        A, B, gradient_A, gradient_B = (place(t, way) for t, way in zip(tensors, (*ways, *ways), strict=True))
        layer = Layer(A, B)
        layer.A.grad, layer.B.grad = gradient_A, gradient_B
        pairs.append(LoRAPair("layer", layer, "", "A", "B", view, lambda _: 1.0))
    plain, placed = pairs
    if correction == "sds-split":
        return _error_of_step(plain, placed)
    recorder = Recorder(placed.module.parameters())
    method = WholeMatrices() if correction == "whole" else correction
    SDSPreconditioner(recorder, [placed], method, damping=1e-6).step()
    seen = [_whole(recorder.seen[factor]) for factor in (placed.A, placed.B)]
    expected = oracle.corrected_pair(plain, 1.0 if correction == "scaled" else 0.5, 1e-6)
    blocks = (view.split_A(seen[0]), view.split_B(seen[1]))
    return max(oracle.relative_error(f, e) for f, e in zip(blocks, expected, strict=True))


def errors_with_a_diagonal() -> list[float]:
    """AdaLoRA's pairs, whose diagonal is sharded as well: against the same with whole parameters."""
    mesh = init_device_mesh("cpu", (4,))
    A, B, gradient_A, gradient_B = _tensors([(6, 10), (9, 6)])
    seen: list[list[Tensor]] = []
    for way in (("plain",), ("axis 0",)):
        layer = Layer(*(_place(tensor, mesh, way) for tensor in (A, B)))
        layer.A.grad, layer.B.grad = (_place(tensor, mesh, way) for tensor in (gradient_A, gradient_B))
        layer.E = nn.Parameter(_place(torch.arange(1.0, 7.0, dtype=torch.float64)[:, None], mesh, way))
        pair = LoRAPair("layer", layer, "", "A", "B", Groups(), lambda _: 1.0, "E")
        recorder = Recorder([layer.A, layer.B])
        SDSPreconditioner(recorder, [pair]).step()
        seen.append([_whole(recorder.seen[factor]) for factor in (layer.A, layer.B)])
    return [oracle.relative_error(found, expected) for expected, found in zip(*seen, strict=True)]


def _error_of_step(plain: LoRAPair, placed: LoRAPair) -> float:
    """With a correction of updates, and a step long enough to be shortened: against the same with whole factors."""
    for pair in (plain, placed):
        inner = torch.optim.AdamW(pair.module.parameters(), lr=0.3, weight_decay=0.1)
        SDSPreconditioner(inner, [pair], "sds-split").step()
    return max(
        oracle.relative_error(_whole(found.detach()), expected.detach())
        for found, expected in ((placed.A, plain.A), (placed.B, plain.B))
    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
