"""The examples and the documentation's code run."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

import ill_conditioned
import loraplus
import low_bit
import minimal
import oracle
import peft_finetune
from documented import ROOT, blocks, execute
from recorder import corrected_gradients
from sdsopt import SDSPreconditioner, available_corrections
from sdsopt.cli import main as cli
from sdsopt.compare import Settings
from toy import lora_linear


def test_every_example_is_tested() -> None:
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")}
    texts = [path.read_text(encoding="utf8") for path in (ROOT / "tests").rglob("test_*.py")]
    tested = {name for name in examples if any(re.search(rf"^\s*import {name}$", t, re.MULTILINE) for t in texts)}
    assert examples
    assert tested == examples


def test_minimal(capsys: pytest.CaptureFixture[str]) -> None:
    losses = minimal.main()
    assert losses[-1] < 0.8 * losses[0]
    assert "14 LoRA pairs, rank 8, adapter default" in capsys.readouterr().out


@pytest.mark.parametrize("correction", ["sds", "sds-split"])
def test_peft_finetune_resumes_exactly(
    correction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loss, resumed = peft_finetune.main(correction, steps=30)
    assert loss == resumed
    assert "held-out accuracy" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("inner", ["bitsandbytes.optim.AdamW8bit", "torchao.optim.AdamW4bit"])
def test_low_bit(inner: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(inner.rpartition(".")[0], exc_type=ImportError)
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its step
        results = low_bit.main(["torch.optim.AdamW", inner], steps=6)
        monkeypatch.setattr(low_bit, "SDSPreconditioner", partial(SDSPreconditioner, correction="lora"))
        plain = low_bit.main([inner], steps=6)
    losses, size = results[inner]
    assert losses[-1] < 0.9 * losses[0]
    assert losses[-1] != plain[inner][0][-1]
    assert size < results["torch.optim.AdamW"][1] / 2
    assert f"{inner:28} loss" in capsys.readouterr().out


def test_loraplus(capsys: pytest.CaptureFixture[str]) -> None:
    losses = loraplus.main()
    assert losses[-1] < 0.8 * losses[0]
    assert "learning rates 2.0e-03, 1.6e-02" in capsys.readouterr().out


def test_ill_conditioned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ill_conditioned, "CONDITIONS", (1,))
    ill_conditioned.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def test_the_documented_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/writing-a-correction.md adds one in under 40 lines; this runs that very code."""
    monkeypatch.setattr("sdsopt.corrections.registry._FACTORIES", {})
    [code, *_] = blocks("docs/writing-a-correction.md")
    assert len(code.splitlines()) < 40
    execute(code, "docs/writing-a-correction.md")
    assert available_corrections() == ("sds-scalar",)

    model = lora_linear(scaling=2.0, dtype=torch.float64)
    model.backward_from(torch.randn(12, 10, generator=torch.Generator().manual_seed(0)))
    assert model.A.grad is not None
    assert model.B.grad is not None
    seen = corrected_gradients(model, "sds-scalar", damping=0.0)
    for found, raw, partner in ((seen[model.A], model.A.grad, model.B), (seen[model.B], model.B.grad, model.A)):
        mean = torch.linalg.svdvals(partner.detach()).square().mean().sqrt()
        assert oracle.relative_error(found, raw / mean) < 1e-9


def test_the_readmes_usage() -> None:
    [usage] = blocks("README.md")
    tokens = torch.arange(8).repeat(2, 1)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base_model = transformers.LlamaForCausalLM(config)
    names = execute(usage, "README.md", base_model=base_model, batches=[{"input_ids": tokens, "labels": tokens}])
    assert all(pair.B.any() for pair in names["optimizer"].pairs)


def test_the_table_in_the_readme_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["--version"]) == 0
    text = (ROOT / "README.md").read_text(encoding="utf8")
    for method in Settings().methods:
        assert f"  {method.name} " in text


def test_the_documentation_shows_parts_of_examples_that_exist() -> None:
    shown = [
        part
        for page in (ROOT / "docs").rglob("*.md")
        for part in re.findall(r"^(examples/\w+\.py):(\w+)$", page.read_text(encoding="utf8"), re.MULTILINE)
    ]
    assert shown
    for example, section in shown:
        text = (ROOT / example).read_text(encoding="utf8")
        for mark in (f"# --8<-- [start:{section}]", f"# --8<-- [end:{section}]"):
            assert text.count(mark) == 1, (example, mark)
