"""The benchmark measures what it says, on layers that are small enough for a test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdsopt import find_pairs
from sdsopt.bench import Settings, bench, shapes
from sdsopt.bench.adapter import Adapter
from sdsopt.bench.contenders import contenders_for
from sdsopt.bench.growth import Curve, fitted_exponent, save_figure
from sdsopt.bench.memory import peak_extra_bytes
from sdsopt.bench.shapes import LayerShape, ModelShape
from sdsopt.bench.table import measure
from sdsopt.cli import main
from sdsopt.errors import NativeBuildError
from sdsopt.linalg import use_native_products
from sdsopt.linalg.native import kernels_for

TINY = ModelShape("tiny", (LayerShape(24, 16), LayerShape(8, 16)), 3)
EXPERTS = ModelShape("tiny experts", (LayerShape(24, 16, 4),), 2)
SETTINGS = Settings(device="cpu", rounds=2)
OURS = ["AdamW", "backward", "sds", "sds-split", "scaled", "sds, roots reused", "attach, sds"]

# Third-party packages that pytorch_optimizer and peft import complain of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def adapter(shape: ModelShape = TINY, dtype: torch.dtype = torch.float32) -> Adapter:
    torch.manual_seed(0)
    return Adapter(shape, 2, 4, dtype, "cpu")


def test_the_parameters_of_real_models() -> None:
    """42 million for Llama-3-8B at r = 16, as PEFT counts them."""
    llama = shapes.SHAPES["llama-3-8b"]
    assert llama.num_parameters(16) * llama.blocks == 41_943_040
    assert sum(p.numel() for p in adapter().parameters()) == 2 * TINY.num_parameters(4)
    assert sum(p.numel() for p in adapter(EXPERTS).parameters()) == 2 * EXPERTS.num_parameters(4)


def test_the_adapter_is_made_of_pairs() -> None:
    assert len(find_pairs(adapter())) == 4
    assert [pair.num_blocks for pair in find_pairs(adapter(EXPERTS))] == [4, 4]


def test_every_run_starts_from_the_same_gradients() -> None:
    model = adapter()
    model.backward()
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for p in model.parameters():
        assert p.grad is not None
        p.grad.zero_()
    model.backward()
    assert len(first) == 8
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True) if p.grad is not None)


def test_ours_and_the_naive_loop_correct_alike() -> None:
    """Else their times would say nothing of each other: sds, hooks and the SVD loop hand AdamW the same gradients."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name in ("AdamW", "sds", "attach, sds", "SVD of each factor"):
        model = adapter()
        found, _ = contenders_for(model, peers=True)
        contender = next(c for c in found if c.name == name)
        model.backward()
        with contender.ready():
            contender.run()
        if name == "attach, sds":
            found[0].run()  # hooks leave the step to the optimizer
        first = found[0].state_tensors()
        seen[name] = [tensor for tensor in first if tensor.ndim == 2]
    assert len(seen["sds"]) == 16  # two moments of eight factors
    for name in ("attach, sds", "SVD of each factor"):
        for one, other in zip(seen["sds"], seen[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-9)
    assert not torch.allclose(seen["sds"][0], seen["AdamW"][0])


def test_a_section_has_every_contender() -> None:
    pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    section = measure(TINY, 4, "float32", SETTINGS)
    names = [timing.name for timing in section.timings]
    names = [name for name in names if not name.endswith(", compiled")]  # where there is a compiler
    assert names[:9] == [*OURS, "SVD of each factor", "peft riemannian"]
    assert set(names[9:]) | set(section.skipped) - {"compiled"} == {"LoRA-RITE", "lora-pro-adamw"}
    bare = section.timings[0]
    assert bare.ratio == 1.0 and bare.correction == 0.0 and bare.seconds > 0
    assert all(timing.quartiles[0] <= timing.seconds <= timing.quartiles[1] for timing in section.timings)
    assert (section.blocks, section.pairs) == (3, 6)


def test_memory_limits_the_blocks() -> None:
    llama = shapes.SHAPES["llama-3-8b"]
    one_block = llama.num_parameters(16) * 4 * 7
    section = measure(
        replace(TINY, blocks=50),
        4,
        "float32",
        replace(SETTINGS, peers=False, memory=TINY.num_parameters(4) * 4 * 7 * 5.5 / 2**30),
    )
    assert section.blocks == 5
    assert one_block / 2**30 < SETTINGS.memory


def test_peers_are_not_given_experts() -> None:
    section = measure(EXPERTS, 2, "bfloat16", replace(SETTINGS, clock="cpu"))
    assert [timing.name for timing in section.timings if not timing.name.endswith(", compiled")] == OURS
    assert "one pair of rank r·e" in section.skipped["peers"]


def test_compiled_products_are_in_use_for_their_round_alone() -> None:
    try:
        use_native_products()
    except NativeBuildError as error:
        pytest.skip(str(error))
    use_native_products(False)
    wide = ModelShape("wide", (LayerShape(64, 48),), 1)
    model = Adapter(wide, 1, 8, torch.float32, "cpu")
    contender = next(c for c in contenders_for(model, peers=False)[0] if c.name == "sds, compiled")
    model.backward()
    factor = torch.ones(1, 16, 16)
    assert kernels_for(factor) is None
    with contender.ready():
        assert kernels_for(factor) is not None
        contender.run()
    assert kernels_for(factor) is None


def test_a_peers_failure_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: Adapter) -> torch.optim.Optimizer:
        class Failing(torch.optim.SGD):
            def step(self, closure: object = None) -> None:  # pyright: ignore
                raise RuntimeError("no bfloat16 here\nmore")

        return Failing([torch.zeros(1, requires_grad=True)])

    monkeypatch.setattr(
        "sdsopt.bench.contenders._PEERS", (("broken", "torch", failing), ("absent", "no_such_package", failing))
    )
    section = measure(TINY, 2, "float32", SETTINGS)
    section.skipped.pop("compiled", None)
    assert section.skipped == {"broken": "RuntimeError: no bfloat16 here", "absent": "no_such_package is not installed"}
    assert "sds" in [timing.name for timing in section.timings]


def test_peak_memory() -> None:
    def three_at_once_then_less() -> list[torch.Tensor]:
        kept = [torch.zeros(1000) for _ in range(3)]
        del kept[1:]
        return [*kept, torch.zeros(10)]

    assert 12_000 <= peak_extra_bytes(three_at_once_then_less) < 12_000 + 1_000


def test_exponents() -> None:
    assert fitted_exponent([1, 2, 4, 8], [5.0, 3.0, 12.0, 48.0]) == pytest.approx(2.0)


def test_the_growth_figure(tmp_path: Path) -> None:
    curves = [Curve(axis, "sds", (1, 2), (0.1, 0.2), 1.0) for axis in ("pairs", "rank")]
    save_figure(curves, tmp_path / "growth.png", "title")
    assert (tmp_path / "growth.png").stat().st_size > 1000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "llama-3-8b", TINY)
    monkeypatch.setattr("sdsopt.bench.growth._AXES", (("pairs", (1, 2), lambda x: (x, 2, 8)),))


@pytest.mark.usefixtures("small")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--ranks", "2,3", "--rounds", "1", "--no-peers"]
    assert main(["bench", *options, "--growth", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("| sds |") == 2 and "r = 3, float32: 3 of 3 blocks, 6 pairs" in out
    assert "measuring llama-3-8b, r = 2, float32" in err
    assert {file.name for file in tmp_path.iterdir()} == {"bench.json", "bench.md", "growth.png"}

    assert main(["bench", *options, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    report = json.loads(out)
    assert [section["rank"] for section in report["sections"]] == [2, 3]
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert json.loads((tmp_path / "bench.json").read_text())["growth"][0]["axis"] == "pairs"


def test_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", exc_type=ImportError)
    import transformers

    real = transformers.LlamaConfig
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr("transformers.LlamaConfig", lambda **options: real(**options | small))
    monkeypatch.setitem(shapes.SHAPES, "llama-3-8b", TINY)
    report = bench(replace(SETTINGS, peers=False, training_step=True))
    assert [share.correction for share in report.shares] == ["sds", "sds-split", "scaled"]
    for share in report.shares:
        assert share.step_seconds > 0
        assert share.share < 1
    assert "at 512 tokens" in report.markdown()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "llama"], "unknown shape 'llama'; known: llama-3-8b, qwen3-30b-a3b, sdxl"),
        (["--shapes", ","], "at least one shape"),
        (["--dtypes", "float16"], "unknown dtype 'float16'"),
        (["--ranks", "0"], "ranks must be positive"),
        (["--rounds", "0"], "rounds must be at least 1"),
        (["--memory", "0"], "memory must be positive"),
        (["--clock", "moon"], "--clock"),
        (["--device", "nowhere"], "the device 'nowhere' cannot be used"),
        (["--threads", "0"], "threads"),
    ],
)
def test_mistakes_exit_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
