"""``python -m scorematch ema``: averages the weights of a run over any length, after the fact."""

from __future__ import annotations

import argparse
from pathlib import Path

from scorematch.cli.options import Commands, image_count
from scorematch.training import reconstruct


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "ema",
        help="average the weights of a training run over another length",
        description="Makes the averaged network of any length from the snapshots of a training run, without training "
        "again.\nShort averages follow the training closely; long ones vary less.",
        epilog="Example:\n  python -m scorematch ema runs/faces --length 0.08",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder that train wrote")
    parser.add_argument(
        "--length",
        type=float,
        required=True,
        help="the standard deviation of the weights' shares relative to the run (sigma_rel of EDM2), at most 0.289",
    )
    parser.add_argument(
        "--images", type=image_count, help="the number of images that the average ends at (default: the last snapshot)"
    )
    parser.add_argument("--out", type=Path, help="the folder to write (default: RUN/ema-LENGTH, such as ema-0.080)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    net = reconstruct(args.run_folder, args.length, images=args.images)
    out = Path(args.run_folder, f"ema-{args.length:.3f}") if args.out is None else args.out
    net.save_pretrained(out)
    print(out)
