"""`sdsopt bench`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sdsopt.cli.parser import add_command
from sdsopt.cli.values import listed

_DESCRIPTION = """\
Time the correction beside the bare optimizer and beside other implementations,
on the layer shapes of real models. Everything runs in turn, so that the ratios
hold on a busy machine too."""

_EXAMPLES = """\
sdsopt bench                       Llama-3-8B, r = 16, float32
sdsopt bench --ranks 8,16,64 --dtypes float32,bfloat16 --shapes sdxl
sdsopt bench --training-step       also the share in a whole training step
sdsopt bench --device cuda --growth --out bench-results"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "bench",
        help="what the correction costs, beside AdamW and other implementations",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("--shapes", type=listed(str), metavar="NAMES", help="such as llama-3-8b,sdxl,qwen3-30b-a3b")
    parser.add_argument("--ranks", type=listed(int), metavar="RANKS", help="such as 8,16,64 (default: 16)")
    parser.add_argument("--dtypes", type=listed(str), metavar="NAMES", help="float32, bfloat16 or both")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--rounds", type=int, help="runs of each contender (default: 9)")
    parser.add_argument("--clock", choices=("wall", "cpu"), help="cpu: this process's time, on a busy machine")
    parser.add_argument("--memory", type=float, metavar="GIB", help="limits the layers (default: 2)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: torch's)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out other implementations")
    parser.add_argument("--training-step", action="store_true", help="also time a whole step of a Llama block")
    parser.add_argument("--growth", action="store_true", help="also vary pairs, rank and width")
    parser.add_argument("--out", metavar="DIR", help="write bench.json, bench.md and growth.png there")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    import torch

    from sdsopt.bench import Settings, bench

    # Options that were not given keep the defaults, which are written down in one place.
    names = ("shapes", "ranks", "dtypes", "device", "rounds", "clock", "memory", "peers", "training_step", "growth")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    try:
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        settings = Settings(**given)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))

    def tell(what: str) -> None:
        if not arguments.quiet:
            print(f"measuring {what}", file=sys.stderr)

    report = bench(settings, tell)
    print(json.dumps(report.to_json(), indent=2) if arguments.json else report.markdown())
    for path in report.save(arguments.out) if arguments.out is not None else ():
        print(f"Written: {path}", file=sys.stderr)
    return 0
