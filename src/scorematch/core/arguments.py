"""Checks of the integers and choices among the arguments of a function."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np

from scorematch.core.messages import quote


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
