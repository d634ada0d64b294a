"""Checks of the arguments of a function, and how messages write arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.schema import Field


def as_code(name: str, value: Any = ..., of: str | None = None) -> str:
    """An argument as it is written in Python; see ``argument``."""
    if value is ...:
        return name
    code = f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}"
    return code if of is None else f"{of}(..., {code})"


_write: Callable[[str, Any, str | None], str] = as_code


def argument(name: str, value: Any = ..., *, of: str | None = None) -> str:
    """An argument in a message, as the user writes it: ``levels=18``, or on the command line ``--levels 18``.

    Args:
        name: the name of the parameter.
        value: a value to pass; by default only the name is written.
        of: the function that has this parameter, if the user may have called another one.
    """
    return _write(name, value, of)


@contextmanager
def written_by(write: Callable[[str, Any, str | None], str]) -> Iterator[None]:
    """Within this context ``write(name, value, of)`` makes the texts of ``argument``."""
    global _write
    before, _write = _write, write
    try:
        yield
    finally:
        _write = before


def check_integer(name: str, value: Any) -> int:
    """An integer argument, of Python, NumPy or torch, as an int; TypeError if it is another value."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"{argument(name)} must be an integer, got {quote(value)}.") from error


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
        raise kind(f"{argument(name)} must be an integer {wanted}, got {value!r}.")
    return int(value)


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError if the value of an argument is not one of the choices."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{argument(name)} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_sizes(name: str, sizes: Any, wanted: str) -> tuple[int, ...]:
    """Positive integers in a sequence, an array or a tensor, as a tuple of ints.

    Raises:
        TypeError: if it is another value.
        ValueError: if it is empty, or an integer is not positive.
    """
    values = native(sizes)
    integers = isinstance(values, list) and all(isinstance(value, int) for value in values)
    if not integers or not values or min(values) < 1:
        kind = ValueError if integers else TypeError
        raise kind(f"{name} must be {wanted}, positive integers, got {sizes!r}.")
    return tuple(values)


def check_value(name: str, value: Any, field: Field, example: Any = None) -> None:
    """Checks an argument that is declared by a field.

    Args:
        name: the name of the argument.
        value: its value.
        field: its type and range.
        example: a value for the message about a list.

    Raises:
        TypeError: if it has another type.
        ValueError: if it is out of range.
    """
    if field.fits(value):
        return
    unlimited = replace(field, low=None, high=None, above=None, below=None, choices=None, each=None)
    kind = ValueError if unlimited.fits(value) or (field.kind is float and isinstance(value, float)) else TypeError
    wanted = str(field).replace("null", "None").replace("true or false", "True or False")
    wanted += f", such as {example!r}" if field.kind is list and example else ""
    hint = f" Write [{value!r}]." if field.kind is list and isinstance(value, str) else ""
    raise kind(f"{argument(name)} must be {wanted}, got {quote(value)}.{hint}")
