"""The examples and the documentation's code run."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ill_conditioned
import loraplus
import low_bit
import make_snippets
import minimal
import oracle
import peft_finetune
import tiny_models
from documented import ROOT, blocks, defined, execute, imported, undefined
from recorder import corrected_gradients
from sdsopt import SDSPreconditioner, available_corrections
from sdsopt.cli import main as cli
from sdsopt.compare import Settings
from toy import lora_linear

PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))


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


@pytest.mark.parametrize("page", ["use-with/huggingface.md", "use-with/pytorch.md", "retrofit.md"])
def test_pages_with_code_of_examples(page: str) -> None:
    assert make_snippets.BLOCK.search((ROOT / "docs" / page).read_text(encoding="utf8"))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_that_name_an_example_are_parts_of_it(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf8")
    assert make_snippets.filled(text) == text, "python docs/make_snippets.py fills them in again"
    assert len(make_snippets.BLOCK.findall(text)) == text.count("<!-- examples/")
    assert "--8<--" not in text
    assert "$$" not in text, "GitHub takes backslashes from it: use a math block"


def test_every_marked_part_of_an_example_is_shown() -> None:
    pages = "".join((ROOT / page).read_text(encoding="utf8") for page in PAGES)
    shown = [(example, part) for _, example, part, *_ in make_snippets.BLOCK.findall(pages)]
    marked = [
        (str(example.relative_to(ROOT)), part)
        for example in (ROOT / "examples").glob("*.py")
        for part in re.findall(r"# docs: (?!end$)(\w+)$", example.read_text(encoding="utf8"), re.MULTILINE)
    ]
    assert sorted(shown) == sorted(marked)


def test_a_part_of_an_example_brings_the_imports_that_it_needs() -> None:
    example = """
from __future__ import annotations

import a.b
import c as d

from e import (  # a comment
    f,
    g as h,
)

def function():
    # docs: one
    x = h(a.b)  # pyright: ignore[reportSome]
    # docs: end
    # docs: two
    with d.y:
        f(x)
    # docs: end

# docs: three
class C: ...
# docs: end
"""
    assert make_snippets.parts(example) == {
        "one": "import a.b\n\nfrom e import g as h\n\nx = h(a.b)\n",
        "two": "import c as d\n\nfrom e import f\n\nwith d.y:\n    f(x)\n",
        "three": "class C: ...\n",
    }


SHORT = ["index", "usage", "preset", "corrections/lora-muon", "corrections/lora-plus", "api/diagnostics"]
STEP = "model(**batch).loss.backward(); optimizer.step()"


@pytest.mark.parametrize("page", [*(f"docs/{page}.md" for page in SHORT), "docs/inner-optimizers.md"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_short_blocks_run(page: str) -> None:
    """Each with a fresh model, and the names that the blocks above it leave; where it says so, there is a step."""
    names: dict[str, Any] = {}
    for code in blocks(page):
        if "bitsandbytes" in code:
            pytest.importorskip("bitsandbytes", exc_type=ImportError)
            pytest.importorskip("torchao", exc_type=ImportError)
        model, batch = tiny_models.llama()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        if "attach" not in code:
            optimizer = SDSPreconditioner(optimizer, model)
        names |= {"model": model, "parameters": parameters, "optimizer": optimizer, "batch": batch}
        names = execute(re.sub(r"\.\.\.  # train.*", STEP, code), page, **names)
        assert "SDSPreconditioner(" not in code or names["optimizer"].pairs


@pytest.mark.parametrize("page", PAGES)
def test_a_block_imports_what_it_uses_and_other_names_are_explained_above(page: str) -> None:
    """A variable is explained by `name` in the text above the block, or by a block above that defines it."""
    importable = {name for other in PAGES for code in blocks(other) for name in imported(code)}
    text = (ROOT / page).read_text(encoding="utf8")
    for code in blocks(page):
        above = text.partition(code)[0]
        earlier = {name for block in re.findall(r"```python\n(.*?)```", above, re.DOTALL) for name in defined(block)}
        explained = set(re.findall(r"`([a-z]\w*)`", re.sub(r"```.*?```", "", above, flags=re.DOTALL)))
        assert undefined(code) <= (earlier | explained) - importable, code
