"""The types of options: functions from a text to a value, which raise ``argparse.ArgumentTypeError`` for a bad text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from scorematch.core.schema import Field


def fitting(field: Field) -> Callable[[str], Any]:
    """Values that have the type and the range of a field; integers may be written as 50k or 5M, and None as none."""

    def parse(text: str) -> Any:
        if field.optional and text == "none":
            return None
        try:
            value = _integer(text) if field.kind is int else field.kind(text)
        except ValueError:
            value = None
        if value is None or not field.fits(value):
            examples = ", such as 64, 50k or 5M" if field.kind is int and field.high is None else ""
            raise argparse.ArgumentTypeError(f"must be {replace(field, optional=False)}{examples}, got {text!r}")
        return value

    return parse


def _integer(text: str) -> int | None:
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kKmM]?)", text)
    number = Decimal(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()] if match else Decimal("0.5")
    return int(number) if number == int(number) else None


amount = fitting(Field(float, low=0))  # a finite number of at least 0
image_count = fitting(Field(int, low=1))  # such as 64, 50k or 5M


def add_declared(group: argparse._ActionsContainer, name: str, field: Field, text: str, default: Any = None) -> None:
    """Adds the option of an argument that its function declares; if it is not given, it has no parsed value."""
    kinds: dict[type, dict[str, Any]] = {
        bool: {"action": argparse.BooleanOptionalAction},
        list: {
            "nargs": (field.low == field.high and field.low) or "*",
            "type": None if field.each is None else fitting(field.each),
            "metavar": "X",
        },
        str: {"choices": field.choices, "metavar": None if field.choices else "NAME"},
        int: {"type": fitting(field), "metavar": "N"},
        float: {"type": fitting(field), "metavar": "X"},
    }
    flag = f"--{name.replace('_', '-')}"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = ("no", "yes")[default] if isinstance(default, bool) else shown
    text = text if shown in (None, "") else f"{text} (default: {shown})"
    group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kinds[field.kind])


def filled(text: str) -> str:
    """A name or a path; not an empty text, such as an unset variable of a shell, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(
            f"the home folder {Path(text).parts[0]} is not known; for another file or folder write ./{text}"
        ) from error
    return text


def expanded(text: str) -> Path:
    """A path; shells replace the ~ of ``--out ~/runs`` but not of ``--out=~/runs``."""
    return Path(filled(text)).expanduser()
