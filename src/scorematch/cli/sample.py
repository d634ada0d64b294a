"""``python -m scorematch sample``: draws images with a trained network."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

import torch
from torch import Tensor

from scorematch.bulk import Classes, SampleFolder, image_classes, read_samples, this_process
from scorematch.cli.options import (
    Commands,
    add_classes,
    add_guidance,
    add_model,
    add_samplers,
    add_sampling,
    announce,
    check_folder_name,
    count,
    find_classes,
    guide,
    load,
    make_sampler,
)
from scorematch.guidance import GuidedScore
from scorematch.images import check_picture, save_grid, save_image
from scorematch.score import ScoreNet

_BATCH_SIZE = 64
_ON_THE_SHEET = 64


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sample",
        help="draw images with a trained network",
        description="Draws images with a trained network, as one picture or into a folder.\n\n"
        "FOLDER/images gets one PNG file per image, or .npz files; image i depends on the seed and on i only. The\n"
        "same command again continues after an interruption, and a larger -n adds images. FOLDER/samples.json has the\n"
        "settings, FOLDER/sheet.png the first images. torchrun and accelerate launch run the command on many devices.",
        epilog="Examples:\n"
        "  python -m scorematch sample mnist digits.png\n"
        "  python -m scorematch sample mnist digit.png -n 1 --seed 7\n"
        "  python -m scorematch sample mnist digits.png --sampler ode --levels 18\n"
        "  python -m scorematch sample mnist --out digits -n 50000\n"
        "  accelerate launch -m scorematch sample mnist --out digits -n 50000",
    )
    add_model(parser)
    parser.add_argument(
        "picture", nargs="?", help="the file to write, such as digits.png; an existing one is overwritten"
    )
    parser.add_argument(
        "-n",
        type=int,
        default=64,
        help="the number of images; one is written without a border, several as a grid (default: 64)",
    )
    parser.add_argument("--columns", type=int, help="images per row of the grid (default: about as many as rows)")
    many = parser.add_argument_group("many images")
    many.add_argument("--out", type=Path, metavar="FOLDER", help="write into a folder instead of one picture")
    many.add_argument(
        "--batch-size",
        type=int,
        metavar="IMAGES",
        help=f"how many images each process draws at once (default: {_BATCH_SIZE})",
    )
    many.add_argument(
        "--npz", action="store_true", help="write one .npz file per batch, with the pixels (N, H, W, C) as arr_0"
    )
    add_classes(parser)
    add_guidance(parser)
    add_sampling(parser)
    add_samplers(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.picture is None and args.out is None:
        args.parser.error("the following arguments are required: picture or --out FOLDER")
    if args.picture is not None and args.out is not None:
        raise ValueError(f"{args.picture} and --out {args.out} exclude each other: name a picture or a folder.")
    if args.out is None and (args.npz or args.batch_size is not None):
        raise ValueError("--batch-size and --npz are for --out FOLDER. Leave them out.")
    if args.columns is not None and args.columns < 1:
        raise ValueError(f"--columns must be at least 1, got {args.columns}.")
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}.")
    loaded, shape, device = load(args)
    net = guide(args, loaded)
    if net.conditioning is not None and net.conditioning.channels:
        raise ValueError(
            f"{args.model} restores images: it takes an image as its condition. Write python -m scorematch restore."
        )
    condition = find_classes(args, net)
    if args.out is None:
        _draw_picture(args, net, shape, device, condition)
    else:
        _fill_folder(args, net, shape, device, condition)


def _draw_picture(
    args: argparse.Namespace,
    net: ScoreNet | GuidedScore,
    shape: tuple[int, ...],
    device: torch.device,
    condition: Classes,
) -> None:
    sampler = make_sampler(args, net.inference_copy())
    classes = _classes(args, net, condition, args.n)
    check_picture(args.picture)  # before the work
    announce(sampler, args.n, shape, device, classes)
    # A generator on the CPU draws the same numbers for every device.
    generator = torch.Generator().manual_seed(args.seed)
    begin = time.perf_counter()
    images = sampler.sample(args.n, condition=classes, generator=generator, progress=not args.quiet)
    print(f"{count(args.n)} in {time.perf_counter() - begin:.1f} s")
    if args.n == 1:
        save_image(images[0], args.picture)
    else:
        save_grid(images, args.picture, args.columns)
    print(args.picture)


def _fill_folder(
    args: argparse.Namespace,
    net: ScoreNet | GuidedScore,
    shape: tuple[int, ...],
    device: torch.device,
    condition: Classes,
) -> None:
    process, processes = this_process()
    sheet = args.out / "sheet.png"
    check_picture(sheet)  # before the work
    check_folder_name(args.out)
    samples = SampleFolder(
        make_sampler(args, net),
        args.out,
        args.n,
        seed=args.seed,
        batch_size=_BATCH_SIZE if args.batch_size is None else args.batch_size,
        condition=condition,
        classes=args.classes,
        format="npz" if args.npz else "png",
        about={"network": args.model, "command": shlex.join(["python", "-m", "scorematch", *map(str, args.argv)])},
    )
    if process == 0:
        if samples.missing < args.n:
            print(f"{args.n - samples.missing} of {count(args.n)} are there")
        if samples.missing:
            few = _classes(args, net, condition, min(samples.missing, _BATCH_SIZE))
            fast = make_sampler(args, net.inference_copy())
            announce(fast, samples.missing, shape, device, few, processes)
    begin = time.perf_counter()
    samples.fill(progress=not args.quiet)
    if process == 0:
        if samples.missing:
            print(f"{count(samples.missing)} in {time.perf_counter() - begin:.1f} s")
        save_grid(read_samples(args.out, min(args.n, _ON_THE_SHEET)), sheet, args.columns)
        print(sheet)
        print(args.out)


def _classes(args: argparse.Namespace, net: ScoreNet | GuidedScore, condition: Classes, n: int) -> Tensor | int | None:
    """The classes of the first n images."""
    if not isinstance(condition, str):
        return condition
    known = None if net.conditioning is None else net.conditioning.classes
    return image_classes(range(n), condition, known if args.classes is None else args.classes, args.seed)
