"""The examples and the documentation's code run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import ill_conditioned
import minimal
import oracle
import peft_finetune
from recorder import corrected_gradients
from sdsopt import available_corrections
from sdsopt.cli import main as cli
from sdsopt.compare import Settings
from toy import lora_linear

ROOT = Path(__file__).parents[1]


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


def test_ill_conditioned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ill_conditioned, "CONDITIONS", (1,))
    ill_conditioned.main()
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf8"), flags=re.DOTALL)


def test_the_documented_correction(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/writing-a-correction.md adds one in under 40 lines; this runs that very code."""
    monkeypatch.setattr("sdsopt.corrections.registry._FACTORIES", {})
    [code, *_] = blocks("docs/writing-a-correction.md")
    assert len(code.splitlines()) < 40
    exec(compile(code, "docs/writing-a-correction.md", "exec"), {"__name__": "documented"})
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
    names = {
        "base_model": transformers.LlamaForCausalLM(config),
        "batches": [{"input_ids": tokens, "labels": tokens}],
    }
    exec(compile(usage, "README.md", "exec"), names)
    assert all(pair.B.any() for pair in names["optimizer"].pairs)  # pyright: ignore


def test_the_table_in_the_readme_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["--version"]) == 0
    text = (ROOT / "README.md").read_text(encoding="utf8")
    for method in Settings().methods:
        assert f"  {method.name} " in text
