"""How messages of errors name values: shortened, on one line, printable."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST = 60  # the largest number of characters of a value in a message
_LONGEST_REASON = 240  # the same for the message of another library
_REPR = reprlib.Repr()  # which stops at the sixth level of nested values
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _LONGEST


def quote(value: Any) -> str:
    """The ``repr`` of a value for messages, shortened to 60 characters."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return _shortened(re.sub(r"\s*\n\s*", " ", text), _LONGEST)


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


@contextmanager
def about(subject: object) -> Iterator[None]:
    """Puts the subject of a ValueError, such as the path of a file, before its message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{subject}: {error}") from error


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
