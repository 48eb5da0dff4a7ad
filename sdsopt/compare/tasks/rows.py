"""A user's data on disk: a text, JSON lines, or a folder of the package `datasets`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdsopt.errors import TaskError
from sdsopt.extras import extra

_JSON_LINES = {".jsonl", ".ndjson", ".json"}
_HELD_OUT_SPLITS = ("validation", "test")

Columns = Mapping[str, Sequence[Any]]


class Rows(NamedTuple):
    """The columns that were asked for.

    Attributes:
        train: What to train on.
        held_out: What the data itself holds out; None where it does not.
    """

    train: Columns
    held_out: Columns | None


def read_rows(path: Path, text: str, label: str | None = None) -> Rows:
    """Reads texts, and labels where these are asked for.

    Args:
        path: A file of JSON lines, a folder that `Dataset.save_to_disk` wrote, or any other file as one plain text.
        text: Name of the column of texts; a plain text has no columns.
        label: Name of the column of labels.

    Raises:
        TaskError: There are no such data; it says what to do about it.
        MissingExtraError: The package `datasets` is needed, and not installed.
    """
    columns = [text] if label is None else [text, label]
    if path.is_dir():
        rows = _from_folder(path, columns)
    elif not path.exists():
        raise TaskError(f"--data: there is no {path}")
    elif path.suffix in _JSON_LINES:
        rows = Rows(_from_lines(path, columns), None)
    elif label is not None:
        raise TaskError(
            f"{path} is read as plain text, which has no labels; give JSON lines (.jsonl) or a datasets folder"
        )
    else:
        rows = Rows({text: [_decoded(path)]}, None)
    for part in (rows.train, rows.held_out):
        if part is not None:
            _check(path, part, text, label)
    return rows


def _from_lines(path: Path, columns: Sequence[str]) -> Columns:
    found: dict[str, list[Any]] = {column: [] for column in columns}
    for number, line in enumerate(_decoded(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row: object = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"line {number} of {path} is no JSON ({error}); there must be one object a line") from error
        if not isinstance(row, dict):
            raise TaskError(f"line {number} of {path} is no JSON object, such as {{{json.dumps(columns[0])}: …}}")
        for column in columns:
            _require_column(f"line {number} of {path}", column, list(row))
            found[column].append(row[column])
    return found


def _from_folder(path: Path, columns: Sequence[str]) -> Rows:
    with extra("hf"):
        from datasets import DatasetDict, load_from_disk
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # of many kinds, also where it is just another folder
        raise TaskError(
            f"{path} cannot be read as a dataset ({error}); write it with datasets.Dataset.save_to_disk, or give a "
            "file of JSON lines"
        ) from error
    if not isinstance(loaded, DatasetDict):
        return Rows(_columns_of(path, loaded, columns), None)
    if "train" not in loaded:
        raise TaskError(f"{path} has no split 'train'; it has {', '.join(map(repr, loaded))}. Save one of them alone.")
    held_out = next((loaded[name] for name in _HELD_OUT_SPLITS if name in loaded), None)
    return Rows(
        _columns_of(path, loaded["train"], columns), None if held_out is None else _columns_of(path, held_out, columns)
    )


def _columns_of(path: Path, dataset: Any, columns: Sequence[str]) -> Columns:
    for column in columns:
        _require_column(str(path), column, dataset.column_names)
    return {column: list(dataset[column]) for column in columns}


def _require_column(where: str, column: str, present: Sequence[str]) -> None:
    if column not in present:
        raise TaskError(
            f"{where} has no column {column!r}; it has {', '.join(map(repr, present)) or 'none'}. Name the columns "
            "with --text and --label."
        )


def _check(path: Path, columns: Columns, text: str, label: str | None) -> None:
    if not any(columns[text]):
        raise TaskError(f"{path} is empty: it holds no text to train on")
    for number, value in enumerate(columns[text], 1):
        if not isinstance(value, str):
            raise TaskError(f"row {number} of {path} has {value!r} in the column {text!r}, where a text should be")
    for number, value in enumerate(columns[label] if label is not None else (), 1):
        if not isinstance(value, str | int):
            raise TaskError(f"row {number} of {path} has the label {value!r}; labels are whole numbers or names")


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf8")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
