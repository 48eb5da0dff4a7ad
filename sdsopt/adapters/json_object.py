"""JSON objects from files that nobody vouches for."""

from __future__ import annotations

import json
from typing import Any

from sdsopt.errors import AdapterError


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object in UTF-8.

    Args:
        text: The document.
        where: What it is, for the error's message; mostly a path.

    Raises:
        AdapterError: It is not UTF-8, not JSON, no object, or an object in it has a key twice.
    """
    try:
        parsed: object = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise AdapterError(f"{where} is not UTF-8 text ({error}); it is damaged, fetch it again") from error
    except ValueError as error:  # JSONDecodeError, a key twice, a number of thousands of digits
        raise AdapterError(f"{where} is not valid JSON ({error}); it is damaged, fetch it again") from error
    except RecursionError as error:
        raise AdapterError(f"{where} is nested too deeply to be an adapter's") from error
    if not isinstance(parsed, dict):
        raise AdapterError(f"{where} holds a JSON {type(parsed).__name__} and no object; it is damaged, fetch it again")
    return parsed


def _without_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers disagree on which of two values counts, so what one has checked another may not load.
    found = dict(items)
    if len(found) != len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.200} occurs twice")
    return found
