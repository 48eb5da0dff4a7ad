"""`sdsopt compare paper`."""

from __future__ import annotations

import argparse
from typing import Any

from sdsopt.cli.cores import cores
from sdsopt.cli.parser import add_command
from sdsopt.extras import extra

_EXAMPLES = """\
sdsopt compare paper --out paper-results"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to those of `sdsopt compare`."""
    parser = add_command(
        subparsers,
        "paper",
        help="measure the claims of SDS-LoRA's paper, with verdicts",
        description="Measure the claims of SDS-LoRA's paper on a vision and a language task, and say\n"
        "which are reproduced. About a quarter of an hour on 2 cores; resumable.",
        examples=_EXAMPLES,
    )
    parser.add_argument("--out", default="sdsopt-results", metavar="DIR", help="results (default: ./%(default)s)")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: the cores, %(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sdsopt.compare import Observer
    from sdsopt.compare.paper import reproduce

    with extra("demo"):
        from rich.console import Console

    from sdsopt.compare.progress import RichObserver

    observer = Observer() if arguments.quiet else RichObserver(Console(stderr=True))
    paper = reproduce(arguments.out, jobs=arguments.jobs, observer=observer)
    console = Console(highlight=False)
    for letter, claim in zip("abcdefgh", paper.claims, strict=False):
        console.print(f"[bold]({letter}) {claim.verdict}[/bold]: {claim.statement}")
        for text, holds in claim.findings:
            console.print(f"    {'✓' if holds else '✗'} {text}", markup=False)
    report, *_ = paper.save_report()
    print(f"Report:  {report}")
    return 0
