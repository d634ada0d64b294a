"""Schemas of configurations: the keys and the types and ranges of their values, checked before a network is built."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_LONGEST = 60  # the largest number of characters of a value in a message
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
        choices: the allowed values; None allows all.
        each: the field of each entry of a list.
    """

    kind: type
    required: bool = False
    optional: bool = False
    low: float | None = None
    high: float | None = None
    choices: Collection[Any] | None = None
    each: Field | None = None

    def __str__(self) -> str:
        if self.choices is not None:
            said = f"one of {', '.join(map(repr, self.choices))}"
        else:
            said = _NAMES[self.kind]
            bounds = []
            if self.low is not None:
                bounds.append(f"at least {_number(self.low)}")
            if self.high is not None:
                bounds.append(f"at most {_number(self.high)}")
            if bounds:
                said += (" with " if self.kind is list else " of ") + " and ".join(bounds)
                said += " entries" if self.kind is list else ""
            if self.each is not None:
                said += f", each {self.each}"
        return said + (" or null" if self.optional else "")

    def fits(self, value: Any) -> bool:
        """Whether a value has the type and range of this field."""
        if value is None:
            return self.optional
        if isinstance(value, bool) != (self.kind is bool):
            return False
        kinds = (int, float) if self.kind is float else (list, tuple) if self.kind is list else self.kind
        if not isinstance(value, kinds):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.choices is not None:
            return value in self.choices
        size: Any = len(value) if isinstance(value, list | tuple) else value
        if self.low is not None and size < self.low:
            return False
        if self.high is not None and size > self.high:
            return False
        return not isinstance(value, list | tuple) or self.each is None or all(map(self.each.fits, value))


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
        raise ValueError(f"{where} has an unknown key, {quote(unknown[0])}; known are {', '.join(fields)}.")
    for key, field in fields.items():
        if key in values and not field.fits(values[key]):
            raise ValueError(f"{where}: {key} must be {field}, got {quote(values[key])}.")


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def quote(value: Any) -> str:
    """The ``repr`` of a value for messages, shortened to 60 characters."""
    said = _REPR.repr(value)
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."
