"""``python -m scorematch models``: lists the networks that have a name."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.pretrained.cards import table


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "models",
        help="list the networks that can be loaded by name",
        description="Lists the networks that can be loaded by name, with their license and what is known of their "
        "quality.",
        epilog="Example:\n  python -m scorematch models",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    print(table())
