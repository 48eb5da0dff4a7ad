"""`sdsopt compare report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdsopt.cli.parser import add_command
from sdsopt.extras import extra

if TYPE_CHECKING:
    from sdsopt.compare import Comparison

_EXAMPLES = """\
sdsopt compare report sdsopt-results             after an update of sdsopt, say
sdsopt compare report sdsopt-results --json      the table's numbers, for a program"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to those of `sdsopt compare`."""
    parser = add_command(
        subparsers,
        "report",
        help="make table, report and figures of a finished comparison again",
        description="Make the table, report.html, table.md and figures of a folder's last finished\n"
        "comparison again, without training. The same records give the same bytes.",
        examples=_EXAMPLES,
    )
    parser.add_argument("directory", metavar="DIR", help="folder of results (--out of `sdsopt compare`)")
    parser.add_argument("--json", action="store_true", help="print the table's numbers as JSON, and write nothing")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sdsopt.compare import load_comparison

    show(load_comparison(Path(arguments.directory)), as_json=arguments.json)
    return 0


def show(comparison: Comparison, *, as_json: bool) -> None:
    """Prints the table and writes the report, or prints JSON alone."""
    if as_json:
        print(json.dumps(comparison.to_json(), indent=2))
        return
    with extra("demo"):
        from rich.console import Console
    Console().print(comparison.table())
    report, *others = comparison.save_report()
    print(f"Report:  {report}")
    print(f"Beside:  {', '.join(path.name for path in others)}")
