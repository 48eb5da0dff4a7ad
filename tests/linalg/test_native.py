"""The compiled products against torch's."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from oracle import relative_error
from sdsopt.errors import NativeBuildError
from sdsopt.linalg import gram, multiply_left, multiply_right, native, use_native_products
from sdsopt.linalg.native import build, kernels_for


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    try:
        use_native_products()
    except NativeBuildError as error:
        pytest.skip(str(error))
    yield
    use_native_products(False)


def factor(blocks: int, length: int, rank: int, *, wide: bool, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(blocks, length, rank), with the long dimension contiguous where it is wide."""
    generator = torch.Generator().manual_seed(seed)
    shape = (blocks, rank, length) if wide else (blocks, length, rank)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return values.mT if wide else values


@settings(deadline=None, max_examples=80)
@given(
    blocks=st.integers(1, 3),
    length=st.integers(1, 300),
    rank=st.integers(1, 70),
    wide=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.float16]),
)
def test_they_are_the_products(blocks: int, length: int, rank: int, wide: bool, dtype: torch.dtype) -> None:
    """Whatever they do not take, torch does."""
    X = factor(blocks, length, rank, wide=wide, dtype=dtype)
    M = torch.randn(blocks, rank, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = X.double()
    torch.testing.assert_close(gram(X), exact.mT @ exact, rtol=1e-13, atol=1e-12)
    precision = torch.finfo(dtype).eps + 1e-14
    for found, wanted, like in (
        (multiply_right(X, M), exact @ M, X),
        (multiply_left(M, X.mT), M @ exact.mT, X.mT),
    ):
        assert found.dtype == dtype
        assert found.shape == like.shape
        assert oracle.relative_error(found, wanted) < precision


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its vectors have one width")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
@pytest.mark.parametrize("wide", [False, True])
def test_older_processors_have_narrower_vectors(
    without: str, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = os.environ.get("CC", "cc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", f"{compiler} {without}")
    use_native_products()
    for rank in range(8, 65):
        X = factor(1, 150, rank, wide=wide, dtype=torch.float32)
        M = torch.randn(1, rank, rank, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        exact = X.double()
        assert kernels_for(X) is not None
        torch.testing.assert_close(gram(X), exact.mT @ exact, rtol=1e-13, atol=1e-12)
        assert oracle.relative_error(multiply_right(X, M), exact @ M) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [64 * 300, 64 * 300 + 5])
def test_threads_share_the_work(length: int, dtype: torch.dtype, wide: bool) -> None:
    X = factor(1, length, 16, wide=wide, dtype=dtype)
    M = torch.randn(1, 16, 16, dtype=torch.float64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = gram(X), multiply_right(X, M)
        torch.set_num_threads(3)
        torch.testing.assert_close(gram(X), expected[0], rtol=1e-13, atol=1e-11)
        assert torch.equal(multiply_right(X, M), expected[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("wide", [False, True])
def test_what_is_not_finite_stays_in_its_row(wide: bool, bad: float) -> None:
    X = factor(1, 50, 9, wide=wide, dtype=torch.float32)
    X[0, 3, 2] = bad
    assert not gram(X)[0, 2].isfinite().any()
    product = multiply_right(X, torch.ones(1, 9, 9, dtype=torch.float64))
    assert not product[0, 3].isfinite().any()
    assert product[0, torch.arange(50) != 3].isfinite().all()


def test_what_they_take() -> None:
    suited = factor(2, 40, 16, wide=False, dtype=torch.float32)
    assert kernels_for(suited) is not None
    assert kernels_for(suited.mT) is not None
    for other in (suited.half(), suited.double(), suited[:, ::2], suited.to("meta")):
        assert kernels_for(other) is None
    use_native_products(False)
    assert kernels_for(suited) is None


def test_they_are_not_compiled_into_a_graph() -> None:
    X = factor(1, 40, 16, wide=False, dtype=torch.float32)
    compiled = torch.compile(gram, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), gram(X), rtol=1e-13, atol=1e-12)


def test_the_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = build.build()
    written = first.stat().st_mtime_ns
    assert build.build() == first
    assert first.stat().st_mtime_ns == written
    assert list((tmp_path / "sdsopt").iterdir()) == [first]  # nothing half-written is left


@pytest.mark.parametrize(
    ("compiler", "message"), [("false", "could not compile sdsopt's products"), (None, "there is no C compiler")]
)
def test_without_a_compiler(
    compiler: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", compiler)
    with pytest.raises(NativeBuildError, match=message):
        use_native_products()
    assert native.kernels_for(torch.ones(1, 40, 16)) is not None  # what was in use still is


def test_a_compiler_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(tmp_path / "no-compiler"))
    with pytest.raises(NativeBuildError, match="No such file"):
        use_native_products()
    assert not list((tmp_path / "sdsopt").iterdir())


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_an_empty_shard_adds_nothing(blocks: int) -> None:
    """A classifier's few rows on many processes: the last of them has none."""
    freed = [torch.full((2, 8, 8), 3.0, dtype=torch.float64) for _ in range(64)]
    del freed  # so that memory that nothing is written into would show
    assert torch.equal(gram(torch.empty(blocks, 0, 8)), torch.zeros(blocks, 8, 8, dtype=torch.float64))


def test_more_threads_than_pieces() -> None:
    X = factor(1, 2000, 16, wide=False, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(64)
        found = gram(X)
    finally:
        torch.set_num_threads(threads)
    assert relative_error(found, X.double().mT @ X.double()) < 1e-13


def test_autograd_sees_through_products_of_what_requires_a_gradient() -> None:
    X = factor(1, 40, 16, wide=False, dtype=torch.float32).requires_grad_()
    root = torch.eye(16, dtype=torch.float64)[None].requires_grad_()
    assert gram(X).requires_grad
    assert multiply_right(X, root.detach()).requires_grad
    assert multiply_right(X.detach(), root).requires_grad
    with torch.no_grad():
        assert kernels_for(X) is not None
