"""`sdsopt compare paper`."""

from __future__ import annotations

import argparse
from typing import Any

from sdsopt.cli.cores import cores
from sdsopt.cli.interrupted import say_interrupted
from sdsopt.cli.parser import add_command
from sdsopt.extras import extra

_DESCRIPTION = """\
Measure four claims of SDS-LoRA's paper on a vision and a language task, and say
of each whether it is reproduced here: effective ranks of the gradients,
alignment with full fine-tuning, convergence over condition numbers, and loss.
About 8 minutes on 2 cores. Interrupted, the same command goes on."""

_EXAMPLES = """\
sdsopt compare paper
sdsopt compare paper --out paper-results --jobs 1"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to those of `sdsopt compare`."""
    parser = add_command(
        subparsers,
        "paper",
        help="measure the claims of SDS-LoRA's paper, with verdicts",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("--out", default="sdsopt-results", metavar="DIR", help="results (default: ./%(default)s)")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: the cores, %(default)s)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sdsopt.compare import Observer
    from sdsopt.compare.paper import OUTCOMES, lettered, reproduce

    with extra("demo"):
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

    from sdsopt.compare.progress import RichObserver

    observer = Observer() if arguments.quiet else RichObserver(Console(stderr=True))
    try:
        paper = reproduce(arguments.out, jobs=arguments.jobs, observer=observer)
    except KeyboardInterrupt:
        return say_interrupted(arguments.out)
    console = Console(highlight=False)
    for letter, claim in lettered(paper.claims):
        console.print(f"[bold]({letter}) {claim.verdict} ({claim.count})[/bold]: {claim.statement}")
        for finding in claim.findings:
            console.print(Padding(Text(f"{finding.outcome.value} {finding.text}"), (0, 0, 0, 4)))
    console.print(OUTCOMES)
    report, *others = paper.save_report()
    print(f"Report:  {report}")
    print(f"Beside:  {', '.join(path.name for path in others)}")
    return 0
