"""``scorematch sample``: draws images with a trained network."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import time
from pathlib import Path

from torch import Tensor

from scorematch.cli.options import Commands, refuse
from scorematch.cli.options.classes import add_classes, add_condition, add_guidance, find_classes, find_condition, guide
from scorematch.cli.options.duration import announce, count
from scorematch.cli.options.networks import add_model, draws_pictures, load
from scorematch.cli.options.outputs import add_overwrite, check_folder_name, check_new
from scorematch.cli.options.samplers import add_sampling, make_sampler
from scorematch.cli.options.values import expanded, filled, image_count
from scorematch.core.conditions import length, takes_image
from scorematch.core.processes import this_process
from scorematch.core.scores import attribute, middle_of
from scorematch.data.arrays import write_arrays
from scorematch.data.pictures import check_picture, grid, save_animation, save_grid, save_image, to_uint8
from scorematch.data.plots import check_plot, save_plot
from scorematch.data.samples import Format, read_samples, values_and_condition
from scorematch.sampling import Sampler
from scorematch.sampling.bulk import Job, prepared
from scorematch.sampling.folder import SampleFolder

_ARRAYS, _PLOTS = (".npz", ".npy"), (".png", ".pdf", ".svg")  # the files of samples that are not pictures
_N = 64
_BATCH_SIZE = 64  # of a folder
_ON_THE_SHEET = 64
_FRAMES = 30  # of an animation, at least, if the sampler has as many steps, and at most twice as many
_PATTERN = re.compile(r"%(0\d{0,2}|\d?)d")  # the number of the image in the name of its file
_DEVIATION = 0.25  # the standard deviation of images in [0, 1] that the preconditioning "karras" assumes


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "sample",
        help="draw images with a trained network",
        description="Draws images with a trained network: as one picture, as one file per image, or into a folder that "
        "can\nhold any number of images. Image i depends on the seed and on i only.\n\n"
        "With --out FOLDER, FOLDER/images gets one PNG file per image, or .npz files. The same command again\n"
        "continues after an interruption, and a larger -n adds images. FOLDER/samples.json has the settings and the\n"
        "command, FOLDER/sheet.png the first images. torchrun and accelerate launch run the command on many devices.",
        epilog="Examples:\n"
        "  %(prog)s mnist digits.png\n"
        "  %(prog)s mnist digit.png -n 1 --seed 7\n"
        "  %(prog)s mnist digits.png --gif\n"
        "  %(prog)s mnist digits.png --sampler ode --levels 18\n"
        "  %(prog)s cifar10-small ships.png --class ship --guidance 2.5\n"
        "  %(prog)s mnist digits/%%03d.png -n 10\n"
        "  %(prog)s mnist --out digits -n 50k\n"
        "  %(prog)s runs/fields fields.npz -n 1000 --condition 0.3,0.7\n"
        "  accelerate launch -m scorematch sample mnist --out digits -n 50k",
    )
    add_model(parser)
    parser.add_argument(
        "picture",
        nargs="?",
        type=filled,
        help="the file to write, such as digits.png; x.npz or x.npy for values in the units of the data (x.png is a "
        "plot of them); or, for one file per image, a pattern such as digits/%%03d.png or "
        "a folder, which exists or is written with a slash at the end",
    )
    parser.add_argument(
        "-n",
        type=image_count,
        help=f"the number of images; several images in one file form a grid (default: {_N}, or one for each sample of "
        "--condition)",
    )
    parser.add_argument(
        "--columns", type=image_count, help="images per row of the grid (default: about as many as rows)"
    )
    parser.add_argument(
        "--gif",
        action="store_true",
        help="also write an animation of the way from noise to the images: digits.gif beside digits.png, or sheet.gif "
        "in the folder of --out. The contrast is reduced at high noise levels, so that the noise remains visible",
    )
    add_overwrite(parser, "files that exist already")
    parser.add_argument(
        "--batch-size",
        type=image_count,
        metavar="IMAGES",
        help=f"images per network call of a process (default: {_BATCH_SIZE} with --out, otherwise as many as have "
        "about a million values)",
    )
    many = parser.add_argument_group("many images")
    many.add_argument("--out", type=expanded, metavar="FOLDER", help="write into a folder instead of a picture")
    many.add_argument(
        "--npz", action="store_true", help="write one .npz file per batch, with the pixels (N, H, W, C) as arr_0"
    )
    add_classes(parser)
    add_condition(parser)
    add_guidance(parser)
    add_sampling(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.picture is None and args.out is not None and args.out.suffix.lower() in _ARRAYS:
        args.picture, args.out = str(args.out), None
    if args.picture is None and args.out is None:
        args.parser.error("the following arguments are required: picture or --out FOLDER")
    if args.picture is not None and args.out is not None:
        raise ValueError(f"{args.picture} and --out {args.out} cannot be combined. Name a picture or a folder.")
    if args.out is None:
        refuse(args, ["npz"], "is for --out FOLDER")
        if (processes := this_process().world_size) > 1:
            raise ValueError(f"{processes} processes cannot write {args.picture} together. Write --out FOLDER.")
    else:
        refuse(args, ["overwrite"], "is for a picture, and --out continues in its folder")
    net = guide(args, load(args, pictures=False))
    if takes_image(net) and args.condition is None:
        raise ValueError(
            f"{args.model} takes an image as its condition. Write {args.program} restore for a network of pictures, or "
            "--condition FILE with an image for each sample."
        )
    job = Job(
        make_sampler(args, net),
        seed=args.seed,
        batch_size=_BATCH_SIZE if args.batch_size is None else args.batch_size,
        classes=find_classes(args, net),
        n_classes=args.n_classes,
        condition=find_condition(args, net),
    )
    samples = length(job.condition) or 1
    if args.n is None:
        args.n = samples if samples > 1 else _N
    if 1 < samples < args.n:
        raise ValueError(f"--condition has {samples} samples, but -n is {args.n}. Leave out -n, or write -n {samples}.")
    if not draws_pictures(net):
        refuse(args, ["gif", "columns"], f"is for pictures, and {args.model} draws other data")
    if args.out is None and (not draws_pictures(net) or Path(args.picture).suffix.lower() in _ARRAYS):
        refuse(args, ["gif", "columns"], f"is for pictures, and {args.picture} is a file of arrays")
        _draw_values(args, job)
    elif args.out is None:
        _draw(args, job)
    else:
        _fill(args, job)


def _draw_values(args: argparse.Namespace, job: Job) -> None:
    """Draws samples into one file of arrays, or into a plot."""
    path = Path(args.picture).expanduser()
    if path.suffix.lower() not in (*_ARRAYS, *_PLOTS):
        raise ValueError(
            f"the file must end in .npz or .npy, or for a plot in {', '.join(_PLOTS)}, got {path}. Write "
            f"{path.parent / path.stem}.npz, or --out FOLDER for many samples."
        )
    if _PATTERN.search(path.name):
        raise ValueError(f"{args.picture} is a pattern, which is for pictures. Name one file, or write --out FOLDER.")
    if path.suffix.lower() in _PLOTS:
        check_plot(path)  # before the work
    check_new([path], args.overwrite)
    sampler = prepared(job.sampler)
    announce(sampler, args.n, job.condition_of(range(1)))
    begin = time.perf_counter()
    x = _sample(args, sampler, job, args.n, None).cpu()
    print(f"{count(args.n, 'sample')} in {time.perf_counter() - begin:.1f} s")
    if path.suffix.lower() in _PLOTS:
        save_plot(x, path)
    else:
        axes = attribute(job.sampler.net, "axes")
        write_arrays(path, values_and_condition(x, job.condition_of(range(args.n)), axes))
    print(path)


def _draw(args: argparse.Namespace, job: Job) -> None:
    """Draws one picture of all images, or one of each image."""
    pictures = _pictures(args.picture, args.n)
    if len(pictures) > 1:
        refuse(args, ["gif", "columns"], "is for one picture of all images, such as digits.png")
    animation = pictures[0].with_suffix(".gif") if args.gif else None
    files = list(dict.fromkeys(filter(None, [*pictures, animation])))
    check_picture(files[0])  # before the work
    check_new(files, args.overwrite)
    sampler = prepared(job.sampler)
    announce(sampler, args.n, job.condition_of(range(1)))
    begin = time.perf_counter()
    images = _sample(args, sampler, job, args.n, animation)
    print(f"{count(args.n)} in {time.perf_counter() - begin:.1f} s")
    shown = images if len(pictures) == len(images) else [grid(images, args.columns)]
    for image, picture in zip(shown, pictures, strict=True):
        if picture != animation:
            save_image(image, picture)
    print(*files if len(files) < 4 else (files[0], "...", files[-1]), sep="\n")


def _pictures(name: str, n: int) -> list[Path]:
    """The files of n images: one for all of them, or one for each if the name is a folder or a pattern."""
    path = Path(name).expanduser()
    # But not my%20digits.png, whose name a browser has escaped.
    if wrong := re.search(r"%(?![0-9A-Fa-f]{2}).?", _PATTERN.sub("", name)):
        raise ValueError(f"a pattern must have %d or %03d for the number of the image, got {wrong[0]!r} in {name!r}.")
    if name.endswith(("/", os.sep)) or path.is_dir():
        check_folder_name(path)
        return [path / f"{i:06d}.png" for i in range(n)]  # as in the folder of --out
    if _PATTERN.search(name):
        return [Path(_PATTERN.sub(lambda found: f"{i:{found[1]}d}", str(path))) for i in range(n)]  # noqa: B023
    if not path.suffix:
        raise ValueError(f"{name} has no extension and is no folder. Write {name}.png, or {name}/ for a new folder.")
    return [path]


def _fill(args: argparse.Namespace, job: Job) -> None:
    """Draws the missing images of a folder."""
    process, sheet, pictures = this_process(), args.out / "sheet.png", draws_pictures(job.sampler.net)
    word = "image" if pictures else "sample"
    check_folder_name(args.out)
    if pictures:
        check_picture(sheet)  # before the work
    about = {"network": args.model, "command": shlex.join(["scorematch", *map(str, args.argv)])}
    kind: Format = "float" if not pictures else "npz" if args.npz else "png"
    samples = SampleFolder(job, args.out, args.n, format=kind, about=about)
    sampler = prepared(job.sampler)
    if process.rank == 0 and samples.found:
        again = samples.missing + samples.found - args.n  # of batches that are not complete
        note = f"; {again} are drawn again" if again else ""
        print(f"{samples.found} of {count(args.n, word)} exist already{note}")
    if samples.missing:
        announce(sampler, samples.missing, job.condition_of(range(1)))
    begin = time.perf_counter()
    samples.fill(progress=not args.quiet)
    if process.rank > 0:
        return
    if samples.missing:
        print(f"{count(samples.missing, word)} in {time.perf_counter() - begin:.1f} s")
    if not pictures:
        print(args.out)
        return
    shown = min(args.n, _ON_THE_SHEET)
    save_grid(read_samples(args.out, shown), sheet, args.columns)
    print(sheet)
    if args.gif:
        animation = sheet.with_suffix(".gif")
        _sample(args, sampler, job, shown, animation)
        print(animation)
    print(args.out)


def _sample(args: argparse.Namespace, sampler: Sampler, job: Job, n: int, animation: Path | None) -> Tensor:
    """Draws the first n images of a job, (n, C, H, W), and writes their animation if it has a path."""
    states = sampler.iterate(
        n,
        condition=job.condition_of(range(n)),
        generator=job.seeds_of(range(n)),
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    frames: list[Tensor] = []
    every = 1
    for i, (x, sigma) in enumerate(states):
        if animation is not None and (i % every == 0 or sigma == 0):
            if len(frames) == 2 * _FRAMES:  # the number of steps is not known before
                frames, every = frames[::2], 2 * every
            frames.append(_frame(sampler, x, sigma, args.columns))
    if animation is not None:
        save_animation(frames, animation)
    return x


def _frame(sampler: Sampler, x: Tensor, sigma: float, columns: int | None) -> Tensor:
    """A state as a grid, uint8 (C, H, W). Its contrast is reduced so that the noise fits into the range of images."""
    middle = middle_of(sampler.net, x)
    contrast = _DEVIATION / math.hypot(_DEVIATION, sigma)
    images = (middle + contrast * (x - middle)).clamp(0, 1)
    return to_uint8(images[0] if len(images) == 1 else grid(images, columns)).cpu()
