"""The command line. A new command is one file here and one line in `_COMMANDS`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sdsopt._version import __version__
from sdsopt.cli import compare
from sdsopt.errors import SDSOptError

# Each module has `add_parser(subparsers)`, which sets `run`: parsed arguments in, exit code out.
_COMMANDS = (compare,)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; None for those of the process.

    Returns:
        The exit code: 0, 1 for an error on the way, 2 for a mistake in the arguments, 130 after Ctrl-C.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        return arguments.run(arguments)
    except SystemExit as exit_:  # argparse ends --help, --version and mistakes so
        return exit_.code if isinstance(exit_.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except (SDSOptError, OSError) as error:
        print(f"sdsopt: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdsopt", description="Preconditioned LoRA gradients for any PyTorch optimizer."
    )
    parser.add_argument("--version", action="version", version=f"sdsopt {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser
