"""How every command's help looks, and where its examples stand."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

EXIT_CODES = """\
exit codes:
  0    done
  1    an error on the way: a missing file, a damaged adapter, a missing extra
  2    a mistake in the arguments
  130  interrupted with Ctrl-C"""


def formatter() -> Any:
    """Returns the formatter with colours where rich-argparse (extra `cli`) is installed, else argparse's own."""
    try:
        from rich_argparse import RawDescriptionRichHelpFormatter
    except ModuleNotFoundError:
        return partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)

    class Formatter(RawDescriptionRichHelpFormatter):
        group_name_formatter = str  # its own would write "--Task Hf"

    return partial(Formatter, max_help_position=28)


def add_command(subparsers: Any, name: str, *, help: str, description: str, examples: str) -> argparse.ArgumentParser:  # noqa: A002
    """Adds a command.

    Args:
        subparsers: What `ArgumentParser.add_subparsers` returned.
        name: The command.
        help: One line for the list of commands.
        description: What it does, at the top of its own help.
        examples: Command lines, one a line, each followed by what it does.

    Returns:
        The command's parser; it must set `run`: parsed arguments in, exit code out.
    """
    indented = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    return subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{indented}\n\n{EXIT_CODES}",
        formatter_class=formatter(),
    )
