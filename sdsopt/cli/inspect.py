"""`sdsopt inspect`."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdsopt.cli.parser import add_command
from sdsopt.extras import extra

if TYPE_CHECKING:
    from sdsopt.adapters import AdapterReport

_DESCRIPTION = """\
Measure how well conditioned the factors of a LoRA adapter are, layer by layer,
and say whether the correction has something to undo there. Reads a PEFT folder,
a Trainer's checkpoint, or one file with names as PEFT, kohya or diffusers
write them. Writes nothing (but the figure, if you ask for one)."""

_EXAMPLES = """\
sdsopt inspect out/checkpoint-500
sdsopt inspect my_lora.safetensors --layer attn1 --plot spectra.png
sdsopt inspect out -q              the judgement alone
sdsopt inspect out --json          all numbers, for a program"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "inspect",
        help="conditioning and spectra of an adapter on disk",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or file")
    parser.add_argument("--layer", metavar="PATTERN", help="only layers with this in their name; * and ? are wildcards")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw spectra and condition numbers (.png, .svg, .pdf)"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="also open .bin, .pt and .ckpt (weights only)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("-q", "--quiet", action="store_true", help="no table")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    from sdsopt.adapters import inspect_adapter
    from sdsopt.adapters.figure import SUFFIXES, save_figure

    figure: Path | None = arguments.plot
    if figure is not None and figure.suffix not in SUFFIXES:
        parser.error(f"--plot: {figure} must end in {', '.join(SUFFIXES)}")
    report = inspect_adapter(arguments.adapter, pattern=arguments.layer, allow_pickle=arguments.allow_pickle)
    if figure is not None:
        save_figure(report, figure)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        _print(report, with_table=not arguments.quiet)
        if figure is not None:
            print(f"Figure: {figure}")
    return 0


def _print(report: AdapterReport, *, with_table: bool) -> None:
    from sdsopt.adapters.summary import summary_lines

    if with_table and report.layers:
        with extra("cli"):
            from rich.console import Console

        from sdsopt.adapters.table import make_table

        Console().print(make_table(report))
    width = min(shutil.get_terminal_size().columns, 100)
    for line in summary_lines(report):
        print(textwrap.fill(line, width, subsequent_indent="  ", break_on_hyphens=False))
