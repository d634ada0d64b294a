"""``scorematch ema``: computes averages of the weights of another length, after the training."""

from __future__ import annotations

import argparse

from scorematch.cli.options import Commands
from scorematch.cli.options.outputs import add_overwrite, check_new_network
from scorematch.cli.options.values import expanded, image_count
from scorematch.training import reconstruct
from scorematch.training.ema import name_of


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "ema",
        help="average the weights of a training run over another length",
        description="Computes the network whose weights are averaged over another length of the training, from the "
        "snapshots\nof a run. Short averages are close to the latest weights; long averages have less noise.",
        epilog="Example:\n  %(prog)s runs/faces --length 0.08",
    )
    parser.add_argument("run_folder", metavar="RUN", type=expanded, help="the folder that train wrote")
    parser.add_argument(
        "--length",
        type=float,
        required=True,
        help="the length of the average, relative to the run: the standard deviation of its profile over the training "
        "(sigma_rel of EDM2), above 0 and at most 0.289",
    )
    parser.add_argument(
        "--images",
        type=image_count,
        help="where the average ends, in images seen by the run, or by its last stage (default: the last snapshot)",
    )
    parser.add_argument("--out", type=expanded, help="the folder to write (default: RUN/ema-LENGTH, such as ema-0.080)")
    add_overwrite(parser, "a network in the folder")
    parser.set_defaults(run=_run, continues="")


def _run(args: argparse.Namespace) -> None:
    out = args.run_folder / f"ema-{name_of(args.length)}" if args.out is None else args.out
    check_new_network(out, args.overwrite)
    net = reconstruct(args.run_folder, args.length, images=args.images)
    net.save_pretrained(out)
    print(out)
