"""`sdsopt compare`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Generator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sdsopt.cli import compare_hf, compare_paper, compare_report
from sdsopt.cli.compare_report import show
from sdsopt.cli.cores import cores
from sdsopt.cli.interrupted import say_interrupted
from sdsopt.cli.parser import add_command
from sdsopt.cli.values import UsageError, listed
from sdsopt.extras import extra

if TYPE_CHECKING:
    from sdsopt.compare import Settings, Task

_RETRIES = 3

_DESCRIPTION = """\
Compare corrections of LoRA gradients over learning rates and seeds, beside
plain LoRA and full fine-tuning. Without arguments: a small ViT pretrained on
the digits 0-4 learns 5-9, with AdamW and SGD; a few minutes on 2 cores."""

_EXAMPLES = """\
sdsopt compare                     everything, on the digits task
sdsopt compare --corrections lora,sds --inner adamw --seeds 5
sdsopt compare --task language --ranks 4,16
sdsopt compare --task hf --model models/qwen --data reviews.jsonl
sdsopt compare --task my_module:MyTask --lrs 1e-4,3e-4,1e-3
sdsopt compare report sdsopt-results    table and figures again"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "compare",
        help="ablation: corrections x learning rates x seeds, table and figures",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "--task",
        default="digits",
        help="digits (default), language, minilm, factorization, sensing, hf (--model, --data), or your own as "
        "package.module:Task",
    )
    compare_hf.add_arguments(parser)
    parser.add_argument(
        "--corrections", type=listed(str), metavar="NAMES", help="such as lora,sds,sds-paper (default: four)"
    )
    parser.add_argument("--no-full", dest="full", action="store_false", help="leave out full fine-tuning")
    parser.add_argument("--inner", type=listed(str), metavar="NAMES", help="adamw, sgd or both (default)")
    parser.add_argument(
        "--lrs", type=listed(float), metavar="LRS", help="one grid for all methods (default: each method's own)"
    )
    parser.add_argument("--widen", type=int, help="times a grid may grow where its best rate is an edge (default: 4)")
    parser.add_argument("--seeds", type=_seeds, help="their number, or a list such as 0,1,5 (default: 3)")
    parser.add_argument("--ranks", type=listed(int), help="ranks of the adapters, such as 4,16 (default: 8)")
    parser.add_argument("--steps", type=int, help="steps of every run (default: 150)")
    parser.add_argument("--out", default="sdsopt-results", metavar="DIR", help="results (default: ./%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the results in DIR, instead of resuming")
    parser.add_argument("--jobs", type=int, default=cores(), help="processes (default: the cores, %(default)s)")
    parser.add_argument("--dask", metavar="ADDRESS", help="compute on a Dask cluster, such as tcp://host:8786")
    parser.add_argument(
        "--no-times", dest="times", action="store_false", help="leave out the time of a step, which differs each time"
    )
    parser.add_argument("--json", action="store_true", help="print the table's numbers as JSON, and write no report")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))
    others = parser.add_subparsers(title="more", metavar="COMMAND")
    for command in (compare_paper, compare_report):
        command.add_parser(others)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    # Here and not above: `sdsopt --help` works without the extra.
    from sdsopt.compare import Observer, compare
    from sdsopt.compare.grid import make_grids

    with extra("demo"):
        from rich.console import Console

    from sdsopt.compare.progress import RichObserver

    try:
        task, settings = compare_hf.make_task(arguments) or load_task(arguments.task), _settings(arguments)
        make_grids(task, settings)  # a mistake in the grid is a usage error, and shows before anything runs
        if arguments.jobs < 1:
            raise UsageError(f"--jobs must be at least 1, got {arguments.jobs}")
    except ValueError as error:
        parser.error(str(error))

    observer = Observer() if arguments.quiet else RichObserver(Console(stderr=True))
    try:
        with _executor(arguments.dask) as executor:
            comparison = compare(
                task,
                settings,
                out=arguments.out,
                jobs=arguments.jobs,
                executor=executor,
                fresh=arguments.fresh,
                times=arguments.times,
                observer=observer,
            )
    except KeyboardInterrupt:
        return say_interrupted(arguments.out, "the same command" + (" without --fresh" if arguments.fresh else ""))

    show(comparison, as_json=arguments.json)
    return 0


@contextmanager
def _executor(address: str | None) -> Generator[Executor | None]:
    """Connects to a Dask scheduler; None stays on this machine."""
    if address is None:
        yield None
        return
    with extra("dask"):
        from distributed import Client
    with Client(address) as client:
        # A worker that dies is not the run's fault: Dask gives its runs to another.
        yield client.get_executor(retries=_RETRIES, pure=False)


def load_task(name: str) -> Task:
    """Returns an embedded task, or an instance of the class `package.module:Task`.

    Raises:
        UsageError: There is no such task, or it is not a `Task`.
    """
    from sdsopt.compare import TASKS, Task

    if name in TASKS:
        return TASKS[name]()
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise UsageError(f"--task is hf, {', '.join(TASKS)} or package.module:Task, got {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, and unlike an installed command
    try:
        found: Any = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise UsageError(f"--task: no module {module_name!r}") from error
    except AttributeError as error:
        raise UsageError(f"--task: {module_name} has no {attribute!r}") from error
    task = found() if isinstance(found, type) and issubclass(found, Task) else found
    if not isinstance(task, Task):
        raise UsageError(f"--task: {name} is not a sdsopt.compare.Task")
    return task


def _settings(arguments: argparse.Namespace) -> Settings:
    from sdsopt.compare import Settings

    # Options that were not given keep the defaults, which are written down in one place.
    names = ("corrections", "full", "inner", "lrs", "widen", "seeds", "ranks", "steps")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return Settings(**given)


def _seeds(text: str) -> list[int]:
    values = listed(int)(text)
    return values if "," in text else list(range(*values))
