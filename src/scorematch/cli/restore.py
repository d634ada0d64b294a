"""``scorematch restore``: restores damaged pictures with a trained network."""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.cli.options import Commands
from scorematch.cli.options.classes import add_classes, find_classes
from scorematch.cli.options.duration import announce
from scorematch.cli.options.networks import add_model, load
from scorematch.cli.options.operators import add_operators, add_restore_method, read_operator
from scorematch.cli.options.outputs import add_overwrite, check_folder_name, check_new
from scorematch.cli.options.samplers import add_sampling, make_sampler
from scorematch.cli.options.values import amount, expanded, filled, image_count
from scorematch.core.conditions import takes_image
from scorematch.core.files import write_whole
from scorematch.core.messages import about
from scorematch.core.randomness import seed_of
from scorematch.data.heat import heat_map
from scorematch.data.pictures import check_picture, grid, list_pictures, read_image, save_image
from scorematch.nets.family import check_size
from scorematch.restoration import Observation, Operator, as_operator, summary
from scorematch.restoration.palette import condition_of
from scorematch.sampling import ParticleSampler, Sampler

_TOGETHER = 64  # restorations that are in memory at once, unless more of one picture are wanted


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "restore",
        help="fill holes in pictures, extend, colorize, enlarge or clean them with a trained network",
        description="Restores damaged pictures with a trained network. For each picture it writes several "
        "restorations, and a strip\nthat shows the picture and its restorations side by side.",
        epilog="Examples:\n"
        "  %(prog)s mnist damaged.png restored --operator mask:observed.png\n"
        "  %(prog)s palette-celeba gray-faces restored --operator gray\n"
        "  %(prog)s mnist digits restored --operator pool:2 --degrade --restore-method replace",
    )
    add_model(parser)
    parser.add_argument("pictures", type=filled, help="a damaged picture, or a folder of damaged pictures")
    parser.add_argument("folder", type=expanded, help="the folder to write to")
    add_operators(parser, "damage").add_argument(
        "--operator", type=filled, required=True, help="what was done to the pictures"
    )
    parser.add_argument("-n", type=image_count, default=4, help="the number of restorations per picture (default: 4)")
    parser.add_argument(
        "--sigma",
        type=amount,
        default=0.0,
        help="the standard deviation of the noise in the pictures, for pixel values in [0, 1] (default: 0)",
    )
    parser.add_argument(
        "--uncertainty",
        action="store_true",
        help="also write the mean of the restorations, a map of their standard deviation with its scale, and an .npz "
        "file with both and with quantiles of 5, 50 and 95 %%; use at least -n 19",
    )
    parser.add_argument(
        "--degrade",
        action="store_true",
        help="the pictures are undamaged: damage them first, then restore them and add the originals to the strips",
    )
    add_restore_method(parser)
    parser.add_argument(
        "--batch-size",
        type=image_count,
        metavar="IMAGES",
        help="restorations per network call; pictures of the same size are restored together (default: as many as have "
        "about a million values)",
    )
    add_overwrite(parser, "files that exist already")
    add_classes(parser, rules=False)
    add_sampling(parser, "the recommended one of a network that was trained to restore, and langevin for any other")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.uncertainty and args.n < 2:
        raise ValueError(f"--uncertainty needs several restorations of each picture, got -n {args.n}. Write -n 20.")
    operator, paths, folder = as_operator(read_operator(args.operator)), list_pictures(args.pictures), args.folder
    _check_folder(args, folder, paths)
    if Path(args.pictures).expanduser().resolve() == folder.resolve():
        raise ValueError(f"the restorations would become pictures of the folder {folder}. Write to another folder.")
    net = load(args)
    channels, *own = net.sample_shape or ()
    label: Any = find_classes(args, net)  # an int or None, without a rule
    sampler = make_sampler(args, net.inference_copy(), restoring=True)
    sampler.restore = args.restore_method or "auto"
    check_picture(folder / "strip.png")  # before the work
    # All pictures are read before the first is restored, so that errors come first, and again when they are restored,
    # so that only those of one batch are in memory.
    groups: dict[tuple[int, ...], list[Path]] = {}
    printed: set[str | None] = {None}
    for path in paths:
        with about(path):
            picture = _Picture(args, operator, channels, path)
        for line in (picture.observed(), picture.luma(), picture.difference(channels, *own)):
            if line not in printed:  # each line once
                print(line)
                printed.add(line)
        groups.setdefault(picture.degraded.shape[2:], []).append(path)
    for size, group in groups.items():
        with about(group[0]):
            check_size(net.backbone, size)
    announce(sampler)
    at_once = max(1, (_TOGETHER if args.batch_size is None else args.batch_size) // args.n)
    for group in groups.values():
        for i in range(0, len(group), at_once):
            batch = [_Picture(args, operator, channels, path) for path in group[i : i + at_once]]
            _restore(args, sampler, operator, batch, label)
    if args.quiet:
        print(folder)


class _Picture:
    """A picture to restore.

    Attributes:
        path: the file.
        y: the measurement (1, ...).
        degraded: the measurement as an image (1, C, H, W).
        original: the undamaged image (1, C, H, W) with ``--degrade``, otherwise None.
    """

    def __init__(self, args: argparse.Namespace, operator: Operator, channels: int, path: Path) -> None:
        self.path, self._operator, self._args = path, operator, args
        self.y = read_image(path, channels)[None]
        self.original: Tensor | None = None
        if operator.mask is not None and operator.mask.shape[-2:] != self.y.shape[-2:]:
            raise ValueError(
                f"the mask must have the size of the picture, {_size(self.y)} pixels, got {_size(operator.mask)}."
            )
        if args.degrade:
            self.original, self.y = self.y, operator.measure(self.y)
            generator = torch.Generator().manual_seed(seed_of(args.seed, "noise", path.stem))
            self.y = self.y + args.sigma * torch.randn(self.y.shape, generator=generator)
        elif not _measures(operator, self.y, channels):
            self.y = read_image(path, 1)[None]
        Observation(operator, self.y, args.sigma)  # raises if they do not fit together
        self.degraded = operator.as_image(self.y)
        if self.degraded.shape[1] != channels:
            drawn, needed = ("gray", "RGB") if channels == 1 else ("RGB", "gray")
            raise ValueError(
                f"{args.operator} needs a network that draws {needed} images, and {args.model} draws {drawn} ones."
            )

    def observed(self) -> str | None:
        """A line with the share of the image that is observed; None if all of it is."""
        share = float(self._operator.seen(self.y).float().mean())
        return None if share == 1 else f"{100 * share:.0f} % of the image is observed with {self._args.operator}"

    def luma(self) -> str | None:
        """A line if a picture in color is restored from its luma, otherwise None."""
        if self.original is not None or self.y.shape[1] == self.degraded.shape[1] or not self._in_color():
            return None
        return f"the luma of pictures in color is taken, since {self._args.operator} measures gray images"

    def _in_color(self) -> bool:
        rgb = read_image(self.path, 3)
        return not torch.equal(rgb, rgb[:1].expand_as(rgb))

    def difference(self, channels: int, height: int, width: int) -> str | None:
        """A line with size and color if they differ from those of the network's images, otherwise None."""
        own = color = "color" if channels == 3 else "gray"
        if self.y.shape[1] == self.degraded.shape[1]:
            color = "color" if self._in_color() else "gray"
        if self.degraded.shape[-2:] == (height, width) and color == own:
            return None
        found = f"the image to restore has {_size(self.degraded)} pixels in {color}"
        return f"{found}; images of {self._args.model} have {height}x{width} pixels in {own}"


def _restore(
    args: argparse.Namespace, sampler: Sampler, operator: Operator, pictures: list[_Picture], label: int | None
) -> None:
    """Restores pictures of one size in one call of the sampler, and writes the results.

    Each restoration has its own generator, and does not depend on the other pictures.
    """
    folder, y = args.folder, torch.cat([picture.y for picture in pictures]).repeat_interleave(args.n, 0)
    seeds = [seed_of(args.seed, "restoration", picture.path.stem, k) for picture in pictures for k in range(args.n)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    condition: Tensor | int | None = label
    if takes_image(sampler.net):
        condition = condition_of(operator, y, generators)
    observation = Observation(operator, y, args.sigma)
    given = {"condition": condition, "generator": generators, "batch_size": args.batch_size}
    notes = [""] * len(pictures)
    if isinstance(sampler, ParticleSampler):
        population = sampler.population(observation, **given, progress=not args.quiet)
        images, evidence = population.samples, population.log_evidence.view(-1, args.n).logsumexp(1) - math.log(args.n)
        notes = [f": log p(y) {each:.1f}" for each in evidence.tolist()]
    else:
        images = sampler.sample(observation=observation, **given, progress=not args.quiet)
    for picture, restored, note in zip(pictures, images.cpu().split(args.n), notes, strict=True):
        for k, image in enumerate(restored, 1):
            save_image(image, folder / f"{picture.path.stem}-{k}.png")
        strip = [picture.degraded.clamp(0, 1), restored]
        if picture.original is not None:
            strip.append(picture.original)
        save_image(grid(torch.cat(strip), columns=sum(map(len, strip))), folder / f"{picture.path.stem}-strip.png")
        if args.uncertainty:
            _summarize(restored, folder, picture.path.stem)
        if note or not args.quiet:
            print(f"{folder / f'{picture.path.stem}-strip.png'}{note}")


def _summarize(restored: Tensor, folder: Path, stem: str) -> None:
    """Writes the mean of the restorations (K, C, H, W), the map of their deviation over the channels, and numbers."""
    found = summary(restored)
    save_image(found.mean, folder / f"{stem}-mean.png")
    save_image(heat_map(found.deviation.square().mean(0).sqrt()), folder / f"{stem}-deviation.png")
    content = io.BytesIO()
    np.savez(content, **{name: np.asarray(value) for name, value in found._asdict().items()})  # type: ignore[arg-type]
    write_whole(folder / f"{stem}-uncertainty.npz", content.getvalue())


def _measures(operator: Operator, y: Tensor, channels: int) -> bool:
    """Whether y has as many channels as the measurement of an image with this number of channels."""
    try:
        return operator.pseudo_inverse(y).shape[1] == channels
    except ValueError:
        return False


# -- Files ------------------------------------------------------------------------------------------------------------


def _check_folder(args: argparse.Namespace, folder: Path, pictures: list[Path]) -> None:
    """Raises if results would have the same name as another or as an existing file."""
    check_folder_name(folder)
    sources: dict[str, Path] = {}
    for picture in pictures:
        first = sources.setdefault(picture.stem, picture)
        if first != picture:
            raise ValueError(f"the restorations of {first} and {picture} would have the same file names. Rename one.")
        results = [f"{name}.png" for name in (*range(1, args.n + 1), "strip")]
        if args.uncertainty:
            results += ["mean.png", "deviation.png", "uncertainty.npz"]
        check_new((folder / f"{picture.stem}-{name}" for name in results), args.overwrite)


def _size(images: Tensor) -> str:
    return f"{images.shape[-2]}x{images.shape[-1]}"
