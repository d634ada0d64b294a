"""Operators and restoration methods on the command line, from their tables."""

from __future__ import annotations

import argparse
import functools
import operator
import re
import runpy
import textwrap
from pathlib import Path

from scorematch.core.messages import about
from scorematch.core.processes import this_process
from scorematch.restoration import OPERATORS, Operator, as_operator
from scorematch.restoration.methods import METHODS


def add_operators(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Adds a group of options that lists the forms of the operators."""
    listed = (f"{kind.form}\n{textwrap.indent(textwrap.fill(kind.help, 96), '    ')}" for kind in OPERATORS.values())
    own = "    an operator of your own: runs the code of FILE.py, and takes NAME from it, a class with these arguments"
    text = "\n".join([*listed, "FILE.py:NAME:ARGUMENTS", own, "A @ B", "    first B, then A, such as 'pool:4 @ gray'"])
    return parser.add_argument_group(title, f"An operator says what was done to the pictures:\n{text}")


def read_operator(text: str) -> str | Operator:
    """The text of an operator, which is checked; or the operator, if a part of it is in a file, whose code is run."""
    parts = [_of_file(part) if ".py:" in part else as_operator(part) for part in re.split(r"\s+@\s+", text)]
    return functools.reduce(operator.matmul, parts) if ".py:" in text else text


def _of_file(text: str) -> Operator:
    """The operator of FILE.py:NAME:ARGUMENTS."""
    file, _, called = text.partition(".py:")
    name, colon, arguments = called.partition(":")
    path = Path(f"{file}.py").expanduser()
    if this_process().rank == 0:
        print(f"running the code of {path}", flush=True)
    with about(path):
        found = runpy.run_path(str(path), run_name=path.stem).get(name)
    if isinstance(found, Operator) and not colon:
        return found
    if not (isinstance(found, type) and issubclass(found, Operator)):
        raise ValueError(f"{path} must have a subclass of scorematch.restoration.Operator with the name {name!r}.")
    try:
        return found.parse(arguments) if colon else found()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {error}") from error


def add_restore_method(group: argparse._ActionsContainer) -> None:
    """Adds ``--restore-method``, a name in ``METHODS``; None if it is not given."""
    listed = "; ".join(f"{name}: {method.help} ({method.cost})" for name, method in METHODS.items())
    group.add_argument(
        "--restore-method",
        choices=METHODS,
        help=f"how restorations are made to agree with the degraded picture (default: auto). {listed}",
    )
