"""One bar for every way in which a corrected gradient can come about."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import oracle
from recorder import corrected_gradients
from sdsopt import attach, find_pairs, use_native_products
from sdsopt.errors import NativeBuildError
from sdsopt.linalg import available_inverse_roots
from toy import LoRALinear, factor

EXPONENTS = {"sds": 0.5, "scaled": 1.0}
# As in test_formulas.py: κ of both factors, and the relative error allowed in float32.
BARS = [(1.0, 1e-6), (100.0, 1e-6), (1e4, 1e-4)]

Path = Callable[[pytest.MonkeyPatch], None]


def as_usual(_: pytest.MonkeyPatch) -> None:
    pass


def in_parts(patch: pytest.MonkeyPatch) -> None:
    """As factors of millions of elements: converted some columns or rows at a time, the last part shorter."""
    patch.setattr("sdsopt.linalg.products._CPU_BYTES", 8 * 16 * 37)


def pair_by_pair(patch: pytest.MonkeyPatch) -> None:
    """As factors that are too large for a stack."""
    patch.setattr("sdsopt.engine.stacks._CPU_BYTES", 0)


def stacked(patch: pytest.MonkeyPatch) -> None:
    """As on a device."""
    patch.setattr("sdsopt.engine.stacks._CPU_BYTES", 2**30)


def compiled(patch: pytest.MonkeyPatch) -> None:
    """By the compiled products, with torch's for what they do not take."""
    patch.setattr("sdsopt.linalg.native.kernels._active", None)  # and so it is again after the test
    patch.setattr("sdsopt.engine.stacks._CPU_BYTES", 0)
    try:
        use_native_products()
    except NativeBuildError as error:
        pytest.skip(str(error))


class Layers(nn.Module):
    """Three layers of one shape and one of another, with gradients."""

    def __init__(self, condition: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoRALinear(A, B, 2.0) for A, B, _ in tensors(condition, dtype))
        for layer, (_, _, G) in zip(self.layers, tensors(condition, dtype), strict=True):
            layer.backward_from(G)  # pyright: ignore


@cache
def tensors(condition: float, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    shapes = [(200, 150)] * 3 + [(90, 120)]
    return [
        (factor(16, n, condition, i).to(dtype), factor(m, 16, condition, 10 + i).to(dtype), gradient(m, n).to(dtype))
        for i, (m, n) in enumerate(shapes)
    ]


def gradient(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@cache
def expected(condition: float, dtype: torch.dtype, exponent: float, damping: float) -> list[Tensor]:
    """In the order of the parameters."""
    pairs = find_pairs(Layers(condition, dtype))
    return [block for pair in pairs for (block,) in oracle.corrected_pair(pair, exponent, damping)]


def wrapped(model: Layers, correction: str, damping: float, method: str) -> dict[Tensor, Tensor]:
    return corrected_gradients(model, correction, damping, inverse_root=method)


def hooked(model: Layers, correction: str, damping: float, method: str) -> dict[Tensor, Tensor]:
    raw = {p: p.grad for p in model.parameters()}
    with attach(model, correction, damping=damping, inverse_root=method):
        model.zero_grad()
        torch.autograd.backward([p * g for p, g in raw.items()], [torch.ones_like(p) for p in raw])
    return {p: p.grad for p in raw if p.grad is not None}


@pytest.mark.parametrize("mode", [wrapped, hooked])
@pytest.mark.parametrize("path", [as_usual, in_parts, pair_by_pair, stacked, compiled])
@pytest.mark.parametrize("method", available_inverse_roots())
@pytest.mark.parametrize("correction", EXPONENTS)
def test_every_path_is_as_exact(
    correction: str,
    method: str,
    path: Path,
    mode: Callable[[Layers, str, float, str], dict[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path(monkeypatch)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for damping in (0.0, 1e-6):
            for condition, bar in BARS:
                if dtype == torch.float16 and condition > 100:
                    continue  # the product with the root leaves its range
                tolerance = bar if dtype == torch.float32 else torch.finfo(dtype).eps
                model = Layers(condition, dtype)
                seen = mode(model, correction, damping, method)
                wanted = expected(condition, dtype, EXPONENTS[correction], damping)
                for parameter, value in zip(model.parameters(), wanted, strict=True):
                    found = seen[parameter]
                    assert found.dtype == dtype and found.is_contiguous()
                    assert oracle.relative_error(found, value) < tolerance, (dtype, damping, condition)


def test_the_paths_are_different_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would show nothing: the number of products with a root."""
    counts: list[int] = []
    for path in (pair_by_pair, stacked, in_parts):
        with monkeypatch.context() as patch:
            path(patch)
            with torch.profiler.profile() as profiler:
                corrected_gradients(Layers(10.0, torch.float32), "sds")
            counts.append(sum(event.count for event in profiler.key_averages() if event.key == "aten::bmm"))
    by_pair, in_stacks, by_parts = counts
    assert in_stacks < by_pair < by_parts
