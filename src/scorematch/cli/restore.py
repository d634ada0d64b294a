"""``python -m scorematch restore``: restores damaged pictures with a trained network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from scorematch.cli.options import (
    Commands,
    add_class,
    add_model,
    add_sampling,
    announce,
    check_folder_name,
    find_class,
    load,
    sampler_options,
)
from scorematch.images import check_picture, grid, list_pictures, read_image, read_mask, save_image
from scorematch.observe import JPEG, AveragePool, Grayscale, Mask, Observation, Operator, Uncrop
from scorematch.palette import condition_of
from scorematch.sampling import AnnealedLangevinSampler
from scorematch.sampling.restoration import Restore


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "restore",
        help="fill holes in pictures, extend, colorize, enlarge or clean them with a trained network",
        description="Restores damaged pictures with a trained network. For each picture it writes several "
        "restorations, and a strip\nthat shows the picture and its restorations side by side.",
        epilog="Examples:\n"
        "  python -m scorematch restore mnist damaged.png restored --mask seen.png\n"
        "  python -m scorematch restore palette-mnist gray-digits restored --gray\n"
        "  python -m scorematch restore mnist digits restored --pool 2 --degrade --method guide-jacobian",
    )
    add_model(parser)
    parser.add_argument("pictures", help="a damaged picture, or a folder of damaged pictures")
    parser.add_argument("folder", help="the folder to write to; existing files are never overwritten")
    group = parser.add_argument_group("damage", "What was done to the pictures; exactly one is required.")
    damage = group.add_mutually_exclusive_group(required=True)
    damage.add_argument(
        "--mask", help="parts are missing: a picture of the same size, white where the image is observed"
    )
    damage.add_argument(
        "--uncrop", metavar="SIDES", help="borders are missing: their widths in pixels, such as left=4,right=4"
    )
    damage.add_argument("--gray", action="store_true", help="the colors are missing")
    damage.add_argument("--pool", type=int, metavar="SIZE", help="each block of SIZE x SIZE pixels was averaged to one")
    damage.add_argument(
        "--jpeg", type=int, metavar="QUALITY", help="they were compressed as JPEG of this quality, 1 to 100"
    )
    parser.add_argument("-n", type=int, default=4, help="the number of restorations per picture (default: 4)")
    parser.add_argument(
        "--sigma",
        type=float,
        default=0.0,
        help="the standard deviation of the noise in the pictures, for pixel values in [0, 1] (default: 0)",
    )
    parser.add_argument(
        "--degrade",
        action="store_true",
        help="the pictures are undamaged: damage them first, then restore them and add the originals to the strips",
    )
    parser.add_argument("--original", help="the undamaged picture, or a folder of them, to add to the strips")
    parser.add_argument(
        "--method",
        choices=get_args(Restore),
        default="replace",
        help="how the restorations are made to agree with the picture (default: replace, or guide with --jpeg); "
        "guide-jacobian is more accurate and takes about twice as long",
    )
    add_class(parser)
    add_sampling(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    operator, pictures, folder = _operator(args), list_pictures(args.pictures), Path(args.folder)
    originals = None if args.original is None else list_pictures(args.original)
    if originals is not None and len(originals) != len(pictures):
        raise ValueError(
            f"--original must have one picture for each of the {len(pictures)} pictures to restore, got "
            f"{len(originals)}."
        )
    _check_folder(folder, pictures, args.n)
    net, shape, device = load(args)
    channels = shape[0]
    if args.gray and channels != 3:
        raise ValueError(f"--gray needs a network that draws RGB images, and {args.model} draws gray ones.")
    label = find_class(args, net)
    sampler = AnnealedLangevinSampler(net.inference_copy(), restore=args.method, **sampler_options(args))
    conditional = net.conditioning is not None and net.conditioning.channels > 0  # a network like Palette's
    check_picture(folder / "strip.png")  # before the work
    # A generator on the CPU draws the same numbers for every device.
    generator = torch.Generator().manual_seed(args.seed)
    described: set[str] = set()
    for i, picture in enumerate(pictures):
        y = read_image(picture, 1 if args.gray and not args.degrade else channels)[None]
        original = None if originals is None else read_image(originals[i], channels)[None]
        if args.degrade:
            original, y = y, operator.measure(y)
            y = y + args.sigma * torch.randn(y.shape, generator=generator)
        observation = Observation(operator, y, args.sigma)
        seen = operator.as_image(y)
        if original is not None and original.shape != seen.shape:
            raise ValueError(
                f"the original must have the size of the restored picture, {_size(seen)} pixels, got {_size(original)}."
            )
        # The same line is printed only once.
        for line in (_describe_seen(args, operator, y), _describe_difference(args, picture, seen, shape)):
            if line is not None and line not in described:
                print(line)
                described.add(line)
        condition = condition_of(operator, y.expand(args.n, -1, -1, -1), generator) if conditional else label
        if i == 0:
            announce(sampler, args.n * len(pictures), (channels, *seen.shape[2:]), device, condition)
        images = sampler.sample(
            args.n, condition=condition, observation=observation, generator=generator, progress=not args.quiet
        ).cpu()
        for k, image in enumerate(images, 1):
            save_image(image, folder / f"{picture.stem}-{k}.png")
        strip = [seen.clamp(0, 1), images] if original is None else [seen.clamp(0, 1), images, original]
        save_image(grid(torch.cat(strip), columns=sum(map(len, strip))), folder / f"{picture.stem}-strip.png")
        print(folder / f"{picture.stem}-strip.png")


# -- Options ----------------------------------------------------------------------------------------------------------


def _operator(args: argparse.Namespace) -> Operator:
    if args.mask is not None:
        return Mask(read_mask(args.mask))
    if args.uncrop is not None:
        return _uncrop(args.uncrop)
    if args.gray:
        return Grayscale()
    return AveragePool(args.pool) if args.pool is not None else JPEG(args.jpeg)


def _uncrop(text: str) -> Uncrop:
    """The operator of, for example, "left=4,right=4"."""
    borders = dict(part.partition("=")[::2] for part in text.split(","))
    if not borders.keys() <= {"left", "right", "top", "bottom"} or not all(map(str.isdecimal, borders.values())):
        raise ValueError(f"--uncrop must name sides and pixels, such as left=4,right=4, got {text!r}.")
    return Uncrop(**{side: int(pixels) for side, pixels in borders.items()})


def _check_folder(folder: Path, pictures: list[Path], n: int) -> None:
    """Raises if the results cannot be written without overwriting a file."""
    check_folder_name(folder)
    sources: dict[str, Path] = {}
    for picture in pictures:
        first = sources.setdefault(picture.stem, picture)
        if first != picture:
            raise ValueError(f"the restorations of {first} and {picture} would have the same file names. Rename one.")
        for name in (*(f"{picture.stem}-{k + 1}.png" for k in range(n)), f"{picture.stem}-strip.png"):
            if (folder / name).exists():
                raise ValueError(f"{folder / name} exists already and is not overwritten. Choose another folder.")


# -- What is printed --------------------------------------------------------------------------------------------------


def _describe_seen(args: argparse.Namespace, operator: Operator, y: Tensor) -> str | None:
    """A line with the share of the image that is observed, for masks and missing borders; otherwise None."""
    if args.mask is None and args.uncrop is None:
        return None
    share = float((operator.lift(torch.ones_like(y)) != 0).float().mean())
    where = "" if args.mask is None else f": the white part of {args.mask}"
    return f"{100 * share:.0f} % of the image is observed{where}"


def _describe_difference(
    args: argparse.Namespace, picture: Path, seen: Tensor, shape: tuple[int, int, int]
) -> str | None:
    """A line with the size and color of the image if they differ from those of the network's images, otherwise None."""
    color = "color" if shape[0] == 3 else "gray"
    own = f"{shape[1]}x{shape[2]} pixels in {color}"
    if not args.gray:
        rgb = read_image(picture, 3)
        color = "gray" if torch.equal(rgb, rgb[:1].expand_as(rgb)) else "color"
    found = f"{_size(seen)} pixels in {color}"
    return None if found == own else f"the image to restore has {found}; {args.model} draws {own}"


def _size(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"
