"""An adapter's report in a few sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import median

from sdsopt.adapters.report import AdapterReport, LayerStatus
from sdsopt.adapters.text import shown
from sdsopt.printable import printable

_FINDINGS = {
    LayerStatus.NOT_FINITE: "{} NaN or infinity: the adapter is broken there.",
    LayerStatus.ZERO: "{} ΔW = 0: not trained yet, or not used.",
    LayerStatus.RANK_DEFICIENT: "{} a rank-deficient factor: some of its directions are unused.",
}


def summary_lines(report: AdapterReport) -> Iterator[str]:
    """Yields what to print below the table: the medians, what stands out, what was left out, and the judgement."""
    layers = report.layers
    if layers:
        ranks = ", ".join(map(str, sorted({layer.rank for layer in layers})))
        kappas = (
            _range(name, [getattr(layer, field) for layer in layers if layer.status is not LayerStatus.ZERO])
            for name, field in (("κ(A)", "condition_A"), ("κ(B)", "condition_B"))
        )
        yield f"{_count(len(layers), 'LoRA layer')}, rank {ranks}; {', '.join(kappas)}"
    for status, text in _FINDINGS.items():
        if found := report.count(status):
            yield text.format(f"{_count(found, 'layer')} {'have' if found > 1 else 'has'}")
    for reason, count in Counter(item.reason for item in report.skipped).items():
        first = next(item.name for item in report.skipped if item.reason == reason)
        yield f"Skipped: {count} × {printable(reason)} ({printable(first)}{', …' * (count > 1)})"
    for note in report.notes:
        yield f"Note: {note}"
    yield report.verdict.text


def _range(name: str, values: list[float]) -> str:
    known = [value for value in values if value == value]  # without NaN
    if not known:
        return f"{name} unknown"
    return f"{name} {shown(median(known))} ({shown(min(known))} to {shown(max(known))})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
