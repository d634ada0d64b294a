"""``python -m scorematch convert``: turns a checkpoint of the papers' authors into a folder of this package."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.convert import convert


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint of NCSN, NCSNv2 or adversarial score matching",
        description="Converts a checkpoint of NCSN, NCSNv2 or adversarial score matching into a folder that the other "
        "commands\nand ScoreNet.from_pretrained load.",
        epilog="Example:\n  python -m scorematch convert checkpoint_300000.pth ./cifar10 --config cifar10.yml",
    )
    parser.add_argument("checkpoint", help="the authors' file, checkpoint_<step>.pth")
    parser.add_argument("folder", help="where to write config.json and the weights")
    parser.add_argument("--config", help="the config.yml that the network was trained with")
    parser.add_argument("--raw", action="store_true", help="take the weights themselves, not their moving average")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    net = convert(args.checkpoint, args.folder, config=args.config, raw=args.raw)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {net.schedule}")
    print(args.folder)
