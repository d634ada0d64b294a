"""``scorematch models``: lists the networks with a name, and the checkpoints that can be converted."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.pretrained.cards import table


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "models",
        help="list the networks that can be loaded by name, and the checkpoints that can be converted",
        description="Lists the networks that can be loaded by name, with their size, noise levels, license, sampler "
        "settings\nand what is known about their quality, and the published checkpoints that can be converted.",
        epilog="Example:\n  %(prog)s",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    print(table())
