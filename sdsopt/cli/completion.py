"""`sdsopt completion`."""

from __future__ import annotations

import argparse
from typing import Any

from sdsopt.cli.parser import add_command
from sdsopt.extras import extra

_SHELLS = ("bash", "zsh", "tcsh")

_EXAMPLES = """\
sdsopt completion bash > ~/.local/share/bash-completion/completions/sdsopt
sdsopt completion zsh > ~/.zfunc/_sdsopt      # with ~/.zfunc in your fpath"""


def add_parser(subparsers: Any, whole: argparse.ArgumentParser) -> None:
    """Adds the command, which completes the `whole` program's."""
    parser = add_command(
        subparsers,
        "completion",
        help="shell completion of commands, options and files",
        description="Print a script that makes the shell complete sdsopt's commands and options.",
        examples=_EXAMPLES,
    )
    parser.add_argument("shell", choices=_SHELLS)
    parser.set_defaults(run=lambda arguments: _run(whole, arguments.shell))


def _run(whole: argparse.ArgumentParser, shell: str) -> int:
    with extra("cli"):
        import shtab
    print(shtab.complete(whole, shell))
    return 0
