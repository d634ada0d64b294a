"""Options that several commands share, by what they are about, and the functions that read their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, TypeAlias

from scorematch.core.arguments import argument

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that were given on the command line, and their values."""
    values = {name: getattr(args, name) for name in names if name in args}
    return {name: value for name, value in values.items() if value is not args.parser.get_default(name)}


def refuse(args: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raises ValueError if one of these options was given; ``why`` says why it does not fit, such as "is for --out"."""
    for name in given(args, names):
        raise ValueError(f"{argument(name)} {why}. Leave it out.")
