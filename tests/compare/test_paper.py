"""The report of the paper's claims, on tasks of a hundredth of their size."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from sdsopt.cli import main
from sdsopt.compare import DigitsTask, Settings
from sdsopt.compare import paper as paper_module
from sdsopt.compare.difference import paired_difference
from sdsopt.compare.paper import Claim, Finding, Outcome, convergence, reproduce
from sdsopt.compare.paper.claim import is_above, is_below
from sdsopt.compare.tasks.prepared import in_memory

TINY = {"vision": DigitsTask(width=16, layers=1, pretraining_steps=5)}
SETTINGS = Settings(
    corrections=("lora", "sds", "sds-split"), inner=("adamw",), lrs=(5e-3,), seeds=range(5), ranks=(2,), steps=8
)


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(convergence, "CONDITIONS", (1.0, 10.0))
    monkeypatch.setattr(convergence, "RATES", (1.0,))
    monkeypatch.setattr(convergence, "LIMIT", 60)
    in_memory.cache_clear()


def test_every_claim_has_a_verdict_numbers_and_a_figure(tmp_path: Path) -> None:
    paper = reproduce(tmp_path, tasks=TINY, settings=SETTINGS, jobs=1)
    assert [claim.name for claim in paper.claims] == ["effective-rank", "alignment", "convergence", "losses"]
    for claim in paper.claims:
        assert claim.findings
        assert all(re.search(r"\d", finding.text) for finding in claim.findings)
        assert claim.verdict in ("reproduced", "partly reproduced", "not reproduced here")
    html, markdown, *figures = paper.save_report()
    for path in figures:  # which it shows by name
        assert markdown.read_text(encoding="utf8").count(f"]({path.name})") == 1
    text = html.read_text(encoding="utf8")
    assert text.count("data:image/svg+xml") == 4 == len(figures)
    assert all(claim.verdict in text for claim in paper.claims)


@pytest.mark.parametrize(
    ("held", "verdict"),
    [("✓✓", "reproduced (2 of 2)"), ("✓–✗", "partly reproduced (1 of 3)"), ("–✗", "not reproduced here (0 of 2)")],
)
def test_verdicts_follow_the_findings(held: str, verdict: str) -> None:
    findings = tuple(Finding("text", Outcome(mark)) for mark in held)
    claim = Claim("name", "statement", findings, "", None)  # pyright: ignore
    assert f"{claim.verdict} ({claim.count})" == verdict


@pytest.mark.parametrize(
    ("values", "above"),
    [
        ((1.0, 1.1, 0.9, 1.0, 1.2), "✓"),
        ((0.1, 0.2, 0.1, 0.0, 0.2), "✗"),
        ((0.1, 1.0, 0.2, 0.9, 0.5), "–"),  # the interval holds the threshold
        ((1.0, 1.1, 0.9, 1.0), "–"),  # too few seeds
        ((math.inf, 1.1, 0.9, 1.0, 1.2), "–"),
    ],
)
def test_outcomes_follow_the_interval(values: tuple[float, ...], above: str) -> None:
    found = paired_difference(values, (0.0,) * len(values))
    assert is_above(found, 0.5).value == above
    assert is_below(found, 0.5).value == above.translate(str.maketrans("✓✗", "✗✓"))


@pytest.mark.parametrize(
    ("counts", "exponent"),
    [
        ((10, 100), 1.0),
        ((10, 10), 0.0),
        ((10, 60), math.log10(6)),  # a lower bound: the limit was reached
        ((60, 60), math.inf),  # it never converged, which is no independence
    ],
)
def test_exponents(counts: tuple[int, ...], exponent: float) -> None:
    assert convergence.exponent(counts) == pytest.approx(exponent)


def test_steps_are_counted_as_the_formula_says() -> None:
    """At κ = 10 the split form needs far fewer steps than lora, each at the better of two rates."""
    lora, split = (
        min(convergence.steps_to_solution(correction, 10.0, lr, limit=300) for lr in (1.0, 0.5))
        for correction in ("lora", "sds-split")
    )
    assert split < lora / 3
    assert convergence.steps_to_solution("lora", 10.0, 100.0) == convergence.LIMIT


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    few = replace(SETTINGS, seeds=(0, 1), lrs=(5e-3,), steps=4)
    monkeypatch.setattr(
        paper_module, "reproduce", lambda out, **options: reproduce(out, tasks=TINY, settings=few, **options)
    )
    command = ["compare", "paper", "--out", str(tmp_path), "--jobs", "1", "--quiet"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "(a)" in out and "(d) not reproduced here" in out  # two seeds prove nothing
    assert (tmp_path / "paper.html").exists()

    def interrupted(out: str, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(paper_module, "reproduce", interrupted)
    assert main(command) == 130
    assert f"finished runs are in {tmp_path}, the same command resumes" in capsys.readouterr().err
