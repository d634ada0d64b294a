"""JSON files and their schemas, checks of values before they are used, and how messages name values."""

from __future__ import annotations

import json
import math
import operator
import reprlib
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST = 60  # the largest number of characters of a value in a message
_LONGEST_REASON = 240  # the same for the message of another library
_LARGEST_FILE = 32 * 2**20  # bytes; a configuration with a million noise levels has 20 MB
_DEEPEST = 32  # levels of nested lists and objects
_REPR = reprlib.Repr()  # which stops at the sixth level of nested values
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST
_NAMES = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Field:
    """The type and range of the value of one key.

    ``str(field)`` describes them for messages, such as "an integer of at least 1".

    Args:
        kind: int, float (ints are accepted), str, bool, list or dict.
        required: whether the key must be present.
        optional: whether the value may be null.
        low: the smallest number, or the smallest length of a list.
        high: the largest number, or the largest length of a list.
        above: a number that the value must exceed.
        below: a number that must exceed the value.
        choices: the allowed values; None allows all.
        each: the field of each entry of a list.
        or_list: whether the value may also be a list of such values, at most 16.
    """

    kind: type
    required: bool = False
    optional: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[Any] | None = None
    each: Field | None = None
    or_list: bool = False

    def __str__(self) -> str:
        if self.or_list:
            return f"{replace(self, or_list=False)}, or a list of such values"
        if self.choices is not None:
            text = f"one of {', '.join(map(repr, self.choices))}"
        else:
            text = _NAMES[self.kind]
            bounds = []
            if self.low is not None and self.low == self.high:
                bounds.append(f"exactly {_number(self.low)}")
            else:
                bounds += [] if self.above is None else [f"more than {_number(self.above)}"]
                bounds += [] if self.low is None else [f"at least {_number(self.low)}"]
                bounds += [] if self.high is None else [f"at most {_number(self.high)}"]
                bounds += [] if self.below is None else [f"less than {_number(self.below)}"]
            if bounds:
                text += (" with " if self.kind is list else " of ") + " and ".join(bounds)
                text += " entries" if self.kind is list else ""
            if self.each is not None:
                text += f", each {self.each}"
        if self.optional:
            text += " or null" if self.each is None else ", or null"
        return text

    def fits(self, value: Any) -> bool:
        """Whether a value has the type and range of this field."""
        if value is None:
            return self.optional
        if self.or_list and isinstance(value, list | tuple):
            return 0 < len(value) <= 16 and all(map(replace(self, or_list=False).fits, value))
        if isinstance(value, bool) != (self.kind is bool):
            return False
        kinds = (int, float) if self.kind is float else (list, tuple) if self.kind is list else self.kind
        if not isinstance(value, kinds):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.kind is float and isinstance(value, int) and abs(value) > sys.float_info.max:
            return False
        if self.choices is not None:
            return value in self.choices
        size: Any = len(value) if isinstance(value, list | tuple) else value
        if self.low is not None and size < self.low:
            return False
        if self.above is not None and size <= self.above:
            return False
        if self.high is not None and size > self.high:
            return False
        if self.below is not None and size >= self.below:
            return False
        return not isinstance(value, list | tuple) or self.each is None or all(map(self.each.fits, value))


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


def check(values: Any, fields: Mapping[str, Field], where: str, *, closed: bool = False) -> None:
    """Raises an error if a configuration does not fit its schema.

    Args:
        values: the configuration, a mapping.
        fields: the schema, a ``Field`` for each key.
        where: the name of the configuration in messages, such as its path.
        closed: whether keys that are not in the schema are an error.

    Raises:
        ValueError: if the configuration does not fit; the message names the key, the expected and the actual value.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object with keys, got {quote(values)}.")
    absent = [key for key, field in fields.items() if field.required and key not in values]
    if absent:
        raise ValueError(f"{where} lacks {', '.join(absent)}.")
    if closed and (unknown := [key for key in values if key not in fields]):
        raise ValueError(f"{where} has an unknown key, {quote(unknown[0])}; the known keys are {', '.join(fields)}.")
    for key, field in fields.items():
        if key in values and not field.fits(values[key]):
            raise ValueError(f"{where}: {key} must be {field}, got {quote(values[key])}.")


# -- Arguments --------------------------------------------------------------------------------------------------------


def check_integer(name: str, value: Any) -> int:
    """An integer argument, of Python, NumPy or torch, as an int; TypeError if it is another value."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {quote(value)}.") from error


def check_count(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An integer argument, of Python or NumPy, as an int.

    Raises:
        TypeError: if it is another value.
        ValueError: if it is below ``least`` or above ``most``.
    """
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least or (most is not None and value > most):
        kind = ValueError if integer else TypeError
        wanted = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise kind(f"{name} must be an integer {wanted}, got {value!r}.")
    return int(value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError if the value of an argument is not one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


# -- Values for JSON and for messages ---------------------------------------------------------------------------------


def native(value: Any) -> Any:
    """A value as JSON has it: numbers, arrays and tensors as Python's numbers and lists, and tuples as lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [native(entry) for entry in value] if isinstance(value, list | tuple) else value


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def quote(value: Any) -> str:
    """The ``repr`` of a value for messages, shortened to 60 characters."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return _shortened(text, _LONGEST)


def plain(name: str) -> str:
    """A name from a file for messages: as it is, or quoted if it is long or has characters that cannot be printed."""
    return name if name.isprintable() and len(name) <= _LONGEST else quote(name)


def few(names: Iterable[str], most: int = 3) -> str:
    """Names for messages: the first ones, with dots if there are more than ``most``."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def reason(error: Exception | str) -> str:
    """An error of another library, or its text, for a longer message: one line of at most 240 characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))
    return _shortened(text.rstrip("."), _LONGEST_REASON)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
