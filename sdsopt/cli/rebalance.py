"""`sdsopt rebalance`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sdsopt.cli.parser import add_command

if TYPE_CHECKING:
    from sdsopt.adapters import RebalanceReport

_DESCRIPTION = """\
Write an adapter anew: the same update ΔW = s·B·A in factors of equal norm, as
well conditioned as ΔW allows (A = √Σ·Vᵀ, B = U·√Σ). Everything else is kept:
other tensors, dtypes, metadata and files; but not optimizer.pt, whose moments
belong to the old factors."""

_EXAMPLES = """\
sdsopt rebalance out/checkpoint-500 balanced
sdsopt rebalance my_lora.safetensors my_lora_balanced.safetensors
sdsopt rebalance out out --force   in place"""


def add_parser(subparsers: Any) -> None:
    """Adds the command to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "rebalance",
        help="the same adapter with balanced, well-conditioned factors",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("source", metavar="SRC", help="folder or file, as for inspect")
    parser.add_argument("target", metavar="DST", help="folder or file to write; appears when it is complete")
    parser.add_argument("--method", choices=("svd",), default="svd", help="how ΔW is split (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    parser.add_argument("--allow-pickle", action="store_true", help="also open .bin, .pt and .ckpt (weights only)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sdsopt.adapters import rebalance_adapter

    report = rebalance_adapter(
        arguments.source,
        arguments.target,
        method=arguments.method,
        force=arguments.force,
        allow_pickle=arguments.allow_pickle,
    )
    if not arguments.quiet:
        _print(report)
    return 0


def _print(report: RebalanceReport) -> None:
    from sdsopt.adapters import LayerChange
    from sdsopt.printable import printable

    reasons = {
        LayerChange.ZERO: "ΔW = 0, so that training can start from it",
        LayerChange.ADALORA: "AdaLoRA has singular values of its own",
        LayerChange.BLOCK_DIAGONAL: "B is block-diagonal (kohya's split_qkv), and a loader may take it apart",
    }
    balanced = report.count(LayerChange.BALANCED)
    print(f"Balanced: {balanced} LoRA layers; largest relative change of a ΔW: {report.largest_error:.1e}")
    for change, reason in reasons.items():
        if count := report.count(change):
            print(f"Kept:     {count} LoRA layers: {reason}")
    for item in report.skipped:
        print(f"Kept:     {printable(item.name)}: {item.reason}")
    for name in report.left_out:
        reason = "an optimizer's state is that of the old factors" if name.startswith("optimizer.") else "a folder"
        print(f"Left out: {printable(name)}: {reason}")
    print(f"Written:  {printable(str(report.path))}")
