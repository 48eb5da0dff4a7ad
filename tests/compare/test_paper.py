"""The report of the paper's claims, on tasks of a hundredth of their size."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sdsopt.cli import main
from sdsopt.compare import DigitsTask, Settings
from sdsopt.compare import paper as paper_module
from sdsopt.compare.paper import Claim, convergence, reproduce
from sdsopt.compare.tasks.prepared import prepared

TINY = {"vision": DigitsTask(width=16, layers=1, pretraining_steps=5)}
SETTINGS = Settings(
    corrections=("lora", "sds", "sds-split"), inner=("adamw",), lrs=(5e-3,), seeds=range(5), ranks=(2,), steps=8
)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(convergence, "CONDITIONS", (1.0, 10.0))
    monkeypatch.setattr(convergence, "RATES", (1.0,))
    monkeypatch.setattr(convergence, "LIMIT", 300)
    prepared.cache_clear()


def test_every_claim_has_a_verdict_numbers_and_a_figure(tmp_path: Path) -> None:
    paper = reproduce(tmp_path, tasks=TINY, settings=SETTINGS, jobs=1)
    assert [claim.name for claim in paper.claims] == ["effective-rank", "alignment", "convergence", "losses"]
    for claim in paper.claims:
        assert claim.findings
        assert all(re.search(r"\d", text) for text, _ in claim.findings)
        assert claim.verdict in ("reproduced", "partly reproduced", "not reproduced here")
    html, *figures = paper.save_report()
    text = html.read_text(encoding="utf8")
    assert text.count("data:image/svg+xml") == 4 == len(figures)
    assert all(claim.verdict in text for claim in paper.claims)


@pytest.mark.parametrize(
    ("held", "verdict"),
    [((True, True), "reproduced"), ((True, False), "partly reproduced"), ((False,), "not reproduced here")],
)
def test_verdicts_follow_the_findings(held: tuple[bool, ...], verdict: str) -> None:
    claim = Claim("name", "statement", tuple(("text", holds) for holds in held), "", None)  # pyright: ignore
    assert claim.verdict == verdict


def test_steps_are_counted_as_the_formula_says() -> None:
    """At κ = 10 the split form needs far fewer steps than lora, each at the better of two rates."""
    lora, split = (
        min(convergence.steps_to_solution(correction, 10.0, lr) for lr in (1.0, 0.5))
        for correction in ("lora", "sds-split")
    )
    assert split < lora / 3
    assert convergence.steps_to_solution("lora", 10.0, 100.0) == convergence.LIMIT


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = replace(SETTINGS, seeds=(0, 1), lrs=(5e-3,), steps=4)
    monkeypatch.setattr(
        paper_module, "reproduce", lambda out, **options: reproduce(out, tasks=TINY, settings=few, **options)
    )
    assert main(["compare", "paper", "--out", str(tmp_path), "--jobs", "1", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "(a)" in out and "(d) not reproduced here" in out  # two seeds prove nothing
    assert (tmp_path / "paper.html").exists()
