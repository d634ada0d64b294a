"""The types of options: functions from a text to a value, which raise ``argparse.ArgumentTypeError`` for a bad text."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

from scorematch.core.schema import Field


def fitting(field: Field) -> Callable[[str], Any]:
    """Values that have the type and the range of a field."""

    def parse(text: str) -> Any:
        try:
            value = field.kind(text)
        except ValueError:
            value = None
        if not field.fits(value):
            raise argparse.ArgumentTypeError(f"must be {field}, got {text!r}")
        return value

    return parse


amount = fitting(Field(float, low=0))  # a finite number of at least 0


def image_count(text: str, least: int = 1) -> int:
    """A number of images, such as "50000", "50k" or "5M"; at least ``least``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kM]?)", text)
    number = Decimal(-1) if match is None else Decimal(match[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[match[2]]
    if number < least or number != round(number):
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least {least}, such as 64, 50k or 5M, got {text!r}"
        )
    return round(number)


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
