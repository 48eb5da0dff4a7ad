"""One measurement, and its forms: a table, JSON, a figure."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdsopt.bench.block import Share, measure_share
from sdsopt.bench.growth import Curve, measure_growth, save_figure
from sdsopt.bench.machine import describe_machine
from sdsopt.bench.settings import Settings
from sdsopt.bench.table import HEADINGS, Section, cells, measure_sections, shown
from sdsopt.bench.timing import Stopwatch

_LEGEND = (
    "Everything is run in turn, round by round: step = median [quartiles]; correction = median time beyond bare fused\n"
    "AdamW (attach: beyond backward) of the same round; ratio = (AdamW + correction) / AdamW; extra memory = the most\n"
    "that a step holds beside parameters, gradients and optimizer state, in multiples of the LoRA parameters."
)


@dataclass(frozen=True)
class Report:
    """What was measured, and where.

    Attributes:
        machine: Processor, threads, load and versions.
        sections: One for each model, rank and dtype.
        shares: The correction's share in a training step; empty unless asked for.
        curves: Growth with pairs, rank and width; empty unless asked for.
    """

    machine: dict[str, Any]
    sections: tuple[Section, ...]
    shares: tuple[Share, ...] = ()
    curves: tuple[Curve, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types, times in seconds."""
        return {
            "machine": self.machine,
            "sections": [section.to_json() for section in self.sections],
            "training_step": [vars(share) for share in self.shares],
            "growth": [vars(curve) for curve in self.curves],
        }

    def markdown(self) -> str:
        """Returns the tables in Markdown."""
        lines = [", ".join(f"{name} {value}" for name, value in self.machine.items()), ""]
        for section in self.sections:
            lines += [f"**{section.title}**", "", _line("", *HEADINGS), _line("---", *(["---:"] * len(HEADINGS)))]
            lines += [_line(timing.name, *cells(section, timing)) for timing in shown(section)]
            lines += ["", *(f"Skipped: {name} ({reason})." for name, reason in section.skipped.items()), ""]
        if self.shares:
            tokens = self.shares[0].tokens
            lines += [f"**One Llama-3-8B block, forward, backward and step at {tokens} tokens**", ""]
            lines += [_line("", "r", "dtype", "whole step, ms", "correction, ms", "share"), _line(*["---:"] * 6)]
            lines += [
                _line(
                    share.correction,
                    str(share.rank),
                    share.dtype,
                    f"{1e3 * share.step_seconds:.0f}",
                    f"{1e3 * share.correction_seconds:.2f}",
                    f"{share.share:.2%}",
                )
                for share in self.shares
            ]
            lines.append("")
        for axis in dict.fromkeys(curve.axis for curve in self.curves):
            exponents = ", ".join(f"{c.correction} {c.exponent:.2f}" for c in self.curves if c.axis == axis)
            lines.append(f"Cost grows with {axis} to the power of: {exponents}.")
        return "\n".join([*lines, "", _LEGEND, ""])

    def save(self, directory: str | Path) -> list[Path]:
        """Writes `bench.json`, `bench.md` and, where growth was measured, `growth.png`.

        Returns:
            The files.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / "bench.json", directory / "bench.md"]
        paths[0].write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf8")
        paths[1].write_text(self.markdown(), encoding="utf8")
        if self.curves:
            paths.append(directory / "growth.png")
            save_figure(self.curves, paths[-1], f"Time of the correction, {self.machine['device']}, float32")
        return paths


def bench(settings: Settings | None = None, on_start: Callable[[str], object] = lambda _: None) -> Report:
    """Measures what the settings ask for.

    Args:
        settings: What to measure; None for the defaults.
        on_start: Told what is measured next.
    """
    settings = Settings() if settings is None else settings
    sections = measure_sections(settings, on_start)
    shares: list[Share] = []
    stopwatch = Stopwatch(settings.device, settings.clock)
    if settings.training_step:
        for rank in settings.ranks:
            for dtype in settings.dtypes:
                on_start(f"a training step, r = {rank}, {dtype}")
                shares += measure_share(rank, dtype, settings.rounds, stopwatch)
    curves = measure_growth(settings, on_start) if settings.growth else []
    return Report(
        describe_machine(settings.device) | {"clock": settings.clock}, tuple(sections), tuple(shares), tuple(curves)
    )


def _line(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"
