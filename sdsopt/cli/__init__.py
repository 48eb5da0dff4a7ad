"""The command line. A new command is one file here and one line in `_COMMANDS`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from sdsopt._version import __version__
from sdsopt.cli import bench, compare, completion, inspect, rebalance
from sdsopt.cli.parser import EXIT_CODES, formatter
from sdsopt.errors import SDSOptError

# Each module has `add_parser(subparsers)`, which sets `run`: parsed arguments in, exit code out.
_COMMANDS = (inspect, rebalance, compare, bench)

_EPILOG = f"""\
examples:
  sdsopt inspect out/checkpoint-500     how ill-conditioned an adapter is
  sdsopt rebalance old-adapter new      the same update in balanced factors
  sdsopt compare                        an ablation of corrections, on a task that comes with it
  sdsopt bench                          what the correction costs on this machine
  sdsopt COMMAND --help                 the options of a command, with examples

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error on the way, 2 for a mistake in the arguments, 130 after Ctrl-C.
    """
    try:
        arguments = _parser().parse_args(argv)
        code = arguments.run(arguments)
        sys.stdout.flush()  # a pipe that was closed shows here, and not as a warning at exit
        return code
    except SystemExit as exit_:  # argparse ends --help, --version and mistakes so
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `sdsopt … | head` closed our output: nothing to say, and nothing left to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SDSOptError, OSError) as error:
        print(f"sdsopt: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdsopt",
        description="LoRA training that behaves more like full fine-tuning: tools around the gradient correction.",
        epilog=_EPILOG,
        formatter_class=formatter(),
    )
    parser.add_argument("--version", action="version", version=f"sdsopt {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    completion.add_parser(subparsers, parser)
    return parser
