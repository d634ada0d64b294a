"""``scorematch convert``: converts a checkpoint of the papers' authors into a folder of this package."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.cli.options.outputs import add_overwrite, check_new_network
from scorematch.cli.options.values import expanded
from scorematch.score import ScoreNet


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint of NCSN, NCSNv2, score_sde, EDM, improved-diffusion or guided-diffusion",
        description="Converts a checkpoint of NCSN, NCSNv2, adversarial consistent score matching, score_sde, EDM,\n"
        "improved-diffusion or guided-diffusion into a folder for the other commands and for\n"
        "ScoreNet.from_pretrained. No code in the checkpoint is run. The command models lists the published files.",
        epilog="Examples:\n"
        "  %(prog)s checkpoint_24.pth ./ncsnpp --config ve/cifar10_ncsnpp_continuous\n"
        "  %(prog)s edm-cifar10-32x32-uncond-vp.pkl ./edm\n"
        "  %(prog)s checkpoint_300000.pth ./cifar10 --config cifar10.yml",
    )
    parser.add_argument("checkpoint", help="the authors' file")
    parser.add_argument("folder", type=expanded, help="the folder to write, with config.json and the weights")
    parser.add_argument(
        "--config",
        help="the configuration that the network was trained with, if the checkpoint does not contain it: the name of "
        "a published one, or a JSON or YAML file with the authors' options",
    )
    parser.add_argument(
        "--raw", action="store_true", help="convert the weights of the last step, not their moving average"
    )
    add_overwrite(parser, "a network in the folder")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    check_new_network(args.folder, args.overwrite)
    net = ScoreNet.from_checkpoint(args.checkpoint, config=args.config, raw=args.raw)
    net.save_pretrained(args.folder)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {net.schedule}")
    if net.sample_shape is None:
        print("The checkpoint does not contain the size of the images. The other commands need it: add --config.")
    print(args.folder)
