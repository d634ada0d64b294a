"""JSON files, read with limits on their size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scorematch.core.messages import quote, reason

_LARGEST_FILE = 32 * 2**20  # bytes; a configuration with a million noise levels has 20 MB
_DEEPEST = 32  # levels of nested lists and objects


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: the path of the file.

    Returns:
        The object. If a key occurs several times, its last value is returned.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it has more than 32 MiB, is not valid JSON, is nested more than 32 levels deep, or holds another
            value than an object.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError(f"{path} has more than {_LARGEST_FILE:,} bytes, which is too large for a JSON file.")
    try:
        value = json.loads(content.decode("utf-8-sig"))  # with or without the byte order mark of Windows
        deep = _depth_exceeds(value, _DEEPEST)
    except RecursionError:
        value, deep = None, True
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({reason(error)}).") from error
    if deep:
        raise ValueError(f"{path} is nested too deeply: at most {_DEEPEST} levels of lists and objects are read.")
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {quote(value)}.")
    return value


def _depth_exceeds(value: Any, depth: int) -> bool:
    """Whether a value has more than ``depth`` levels of nested lists and dicts."""
    level = [value]
    for _ in range(depth):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = [each for values in inner for each in values if isinstance(each, dict | list)]
    return bool(level)


def native(value: Any) -> Any:
    """A value as JSON has it: numbers, arrays and tensors as Python's numbers and lists, and tuples as lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [native(entry) for entry in value] if isinstance(value, list | tuple) else value
