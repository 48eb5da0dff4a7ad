"""What a folder of results is a comparison of, so that its report can be made again without training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdsopt.compare.records import Record, RunKey
from sdsopt.compare.step_time import StepTimes
from sdsopt.compare.store import JsonLines
from sdsopt.errors import SDSOptError

_NAME = "comparison.json"


class NoComparisonError(SDSOptError, ValueError):
    """A folder holds no finished comparison."""


def save_manifest(directory: Path, task: str, records: Sequence[Record], times: StepTimes) -> None:
    """Writes which of the folder's records make up its last comparison; whole or not at all."""
    data = {
        "task": task,
        "fingerprint": records[0].fingerprint,
        "runs": [[list(record.key), record.rank] for record in records],
        "step_times": [[*names, value] for names, value in times.items()],
    }
    temporary = directory / f".{_NAME}.{os.getpid()}"
    temporary.write_text(json.dumps(data), encoding="utf8")
    temporary.replace(directory / _NAME)


def load_manifest(directory: Path, store: JsonLines) -> tuple[str, list[Record], StepTimes]:
    """Returns the task's name, the records and the step times of a folder's last comparison.

    Raises:
        NoComparisonError: There is none, or some of its runs are missing from the store.
    """
    try:
        data: dict[str, Any] = json.loads((directory / _NAME).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise NoComparisonError(
            f"{directory} holds no finished comparison ({error}); `sdsopt compare --out {directory}` makes one"
        ) from error
    lines = [line for line in store.read() if line.get("fingerprint") == data["fingerprint"]]
    known: dict[RunKey, Record] = {record.key: record for record in map(Record.from_json, lines)}
    missing = sum(tuple(key) not in known for key, _ in data["runs"])
    if missing:
        raise NoComparisonError(
            f"{missing} of the {len(data['runs'])} runs of {directory}'s comparison are missing from {store.path}; "
            "run the comparison again, which does only what is missing"
        )
    records = [known[tuple(key)].at_rank(rank) for key, rank in data["runs"]]
    times = {(inner, rank, method): value for inner, rank, method, value in data["step_times"]}
    return data["task"], records, times
