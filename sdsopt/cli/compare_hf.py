"""The options of `sdsopt compare --task hf`: a Hugging Face model and data on disk."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from sdsopt.cli.values import UsageError, listed

if TYPE_CHECKING:
    from sdsopt.compare import Task

_NAME = "hf"
_OPTIONS = ("model", "data", "text", "label", "target_modules", "length", "batch_size", "device")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options, none of which has a default here: so it shows which were given."""
    group = parser.add_argument_group(f"--task {_NAME}", "your own Hugging Face model and data, as they lie on disk")
    group.add_argument("--model", metavar="DIR", help="model and tokenizer, as save_pretrained writes them")
    group.add_argument("--data", metavar="PATH", help="a .jsonl file, a folder of save_to_disk, or a plain text")
    group.add_argument("--text", metavar="COLUMN", help="the column of texts (default: text)")
    group.add_argument(
        "--label", metavar="COLUMN", help="the column of labels: classify the texts (default: continue them)"
    )
    group.add_argument(
        "--target-modules", type=listed(str), metavar="NAMES", help="layers to adapt (default: all linear ones)"
    )
    group.add_argument("--length", type=int, help="tokens of a sequence (default: 128)")
    group.add_argument("--batch-size", type=int, help="sequences of a step (default: 8)")
    group.add_argument("--device", help="where to train, such as cuda (default: cpu)")


def make_task(arguments: argparse.Namespace) -> Task | None:
    """Returns the task that the options describe; None for another task.

    Raises:
        UsageError: Options are missing, or belong to this task while another one is named.
        ValueError: A number makes no sense.
    """
    given: dict[str, Any] = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.task != _NAME:
        if given:
            raise UsageError(f"--{next(iter(given)).replace('_', '-')} belongs to --task {_NAME}, not {arguments.task}")
        return None
    missing = [name for name in ("model", "data") if name not in given]
    if missing:
        raise UsageError(f"--task {_NAME} needs --{' and --'.join(missing)}")

    from sdsopt.compare import CausalLMTask, ClassificationTask

    if "target_modules" in given:
        given["target_modules"] = tuple(given["target_modules"])
    return (ClassificationTask if "label" in given else CausalLMTask)(**given)
