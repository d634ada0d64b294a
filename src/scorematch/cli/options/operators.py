"""Operators and restoration methods on the command line, from their tables."""

from __future__ import annotations

import argparse
import textwrap

from scorematch.restoration import OPERATORS
from scorematch.restoration.methods import METHODS


def add_operators(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    """Adds a group of options that lists the forms of the operators."""
    listed = (f"{kind.form}\n{textwrap.indent(textwrap.fill(kind.help, 96), '    ')}" for kind in OPERATORS.values())
    text = "\n".join([*listed, "A @ B", "    first B, then A, such as 'pool:4 @ gray'"])
    return parser.add_argument_group(title, f"An operator says what was done to the pictures:\n{text}")


def add_restore_method(group: argparse._ActionsContainer) -> None:
    """Adds ``--restore-method``, a name in ``METHODS``; None if it is not given."""
    listed = "; ".join(f"{name}: {method.help} ({method.cost})" for name, method in METHODS.items())
    group.add_argument(
        "--restore-method",
        choices=METHODS,
        help=f"how restorations are made to agree with the degraded picture (default: replace). {listed}",
    )
