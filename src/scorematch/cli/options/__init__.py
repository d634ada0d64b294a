"""Options that several commands share, by what they are about, and the functions that read their values."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options of these names that were given on the command line, and their values."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}
