"""``python -m scorematch sample``: draws images with a trained network."""

from __future__ import annotations

import argparse
import time

import torch

from scorematch.cli.options import Commands, add_model, add_sampling, announce, count, find_class, load, sampler_options
from scorematch.images import check_picture, save_grid, save_image
from scorematch.sampling import AnnealedLangevinSampler, Sampler, recommended_sampler


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sample",
        help="draw images with a trained network",
        description="Draws images with a trained network and writes them as one picture.",
        epilog="Examples:\n"
        "  python -m scorematch sample mnist digits.png\n"
        "  python -m scorematch sample mnist digit.png -n 1 --seed 7",
    )
    add_model(parser)
    parser.add_argument("picture", help="the file to write, such as digits.png; an existing one is overwritten")
    parser.add_argument(
        "-n",
        type=int,
        default=64,
        help="the number of images; one is written without a border, several as a grid (default: 64)",
    )
    parser.add_argument("--columns", type=int, help="images per row of the grid (default: about as many as rows)")
    add_sampling(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.columns is not None and args.columns < 1:
        raise ValueError(f"--columns must be at least 1, got {args.columns}.")
    net, shape, device = load(args)
    if net.conditioning is not None and net.conditioning.channels:
        raise ValueError(
            f"{args.model} restores images: it takes an image as its condition. Write python -m scorematch restore."
        )
    condition = find_class(args, net)
    score, options = net.inference_copy(), sampler_options(args)
    sampler: Sampler
    if options.keys() <= {"levels"}:
        sampler = recommended_sampler(score, **options)
    else:
        sampler = AnnealedLangevinSampler(score, **options)
    check_picture(args.picture)  # before the work
    announce(sampler, args.n, shape, device, condition)
    # A generator on the CPU draws the same numbers for every device.
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    images = sampler.sample(args.n, condition=condition, generator=generator, progress=not args.quiet)
    print(f"{count(args.n)} in {time.perf_counter() - begin:.1f} s")
    if args.n == 1:
        save_image(images[0], args.picture)
    else:
        save_grid(images, args.picture, args.columns)
    print(args.picture)
