"""The type and range of the values of a configuration, and their check."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from scorematch.core.messages import quote

__all__ = ["Field"]

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
        each: the field of each entry of a list, or of each value of an object.
        or_list: the largest length of a list of such values that the value may also be; 0 is none.
        units: the power of the units of the data that a number has: 1 for a noise level, 2 for a variance.
        place: whether the number is a value of the data, and not a difference of values.
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
    or_list: int = 0
    units: int = 0
    place: bool = False

    def __str__(self) -> str:
        if self.or_list:
            return f"{replace(self, or_list=0)}, or a list of such values"
        if self.choices is not None:
            text = f"one of {', '.join(map(repr, self.choices))}"
        else:
            text = _NAMES[self.kind]
            limits = {"more than": self.above, "at least": self.low, "at most": self.high, "less than": self.below}
            if self.low is not None and self.low == self.high:
                limits = {"exactly": self.low}
            bounds = [f"{word} {_number(limit)}" for word, limit in limits.items() if limit is not None]
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
            return 0 < len(value) <= self.or_list and all(map(replace(self, or_list=0).fits, value))
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
        entries: Any = value.values() if isinstance(value, dict) else value
        return (
            (self.low is None or size >= self.low)
            and (self.above is None or size > self.above)
            and (self.high is None or size <= self.high)
            and (self.below is None or size < self.below)
            and (self.each is None or all(map(self.each.fits, entries)))
        )

    def in_units(self, value: Any, scale: float, shift: float) -> Any:
        """The value for data x in the units of ``scale * x + shift``."""
        if self.each is not None:
            return [self.each.in_units(entry, scale, shift) for entry in value]
        return value * scale**self.units + (shift if self.place else 0) if self.units else value


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


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
