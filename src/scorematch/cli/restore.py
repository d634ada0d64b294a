"""``scorematch restore``: restores damaged pictures with a trained network."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scorematch.cli.options import Commands, refuse
from scorematch.cli.options.classes import add_classes, add_condition, find_classes
from scorematch.cli.options.duration import announce, count
from scorematch.cli.options.networks import add_model, load
from scorematch.cli.options.operators import add_operators, add_restore_method, read_operator
from scorematch.cli.options.outputs import add_overwrite, check_folder_name, check_new
from scorematch.cli.options.posteriors import restore_arrays
from scorematch.cli.options.samplers import add_sampling, make_sampler
from scorematch.cli.options.values import amount, expanded, filled, fitting, image_count
from scorematch.core.conditions import takes_image, with_image
from scorematch.core.messages import about
from scorematch.core.randomness import seed_of
from scorematch.core.records import hash_of, hash_of_bytes
from scorematch.core.schema import Field
from scorematch.data.array_data import FILES
from scorematch.data.arrays import write_arrays
from scorematch.data.pictures import check_picture, grid, is_deep, list_pictures, open_picture, read_image, save_image
from scorematch.guidance import Tiled
from scorematch.nets.family import check_size
from scorematch.restoration import Mask, Observation, Operator, Photograph, as_operator, summary
from scorematch.restoration.methods import Restore
from scorematch.restoration.moments import image_of
from scorematch.restoration.palette import condition_of
from scorematch.restoration.photograph import fitted
from scorematch.sampling import ParticleSampler, Sampler

_TOGETHER = 64  # restorations that are in memory at once, unless more of one picture are wanted
_OTHER_COLORS = ("CMYK", "YCbCr", "LAB", "HSV")
_WITHOUT_EFFECT = (  # on the results for a picture
    *("pictures", "folder", "overwrite", "skip_existing", "strict", "quiet", "batch_size", "device", "debug"),
    *("argv", "program", "parser", "run", "instead", "continues", "settings"),
)
_SHOWN = 512  # the largest side in pixels of a picture in a strip


def add(commands: Commands) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "restore",
        help="fill holes in pictures, extend, colorize, enlarge or clean them with a trained network",
        description="Restores damaged pictures with a trained network. For each picture it writes several "
        "restorations, and a strip\nthat shows the picture and its restorations side by side.\n\n"
        "Arrays, such as fields, are restored from a file .npz, .h5, .nc or .zarr (with y and, for gaps, the array "
        "mask) or .npy\ninto a file of the draws x (N, K, ...), K of each of N measurements, in the units of the data. "
        "NaN in y is a gap.",
        epilog="Examples:\n"
        "  %(prog)s mnist damaged.png restored --operator mask:observed.png\n"
        "  %(prog)s palette-celeba gray-faces restored --operator gray\n"
        "  %(prog)s mnist digits restored --operator pool:2 --degrade --restore-method replace\n"
        "  %(prog)s runs/fields damaged.npy restored.npz --operator mask:observed.npy --sigma 0.1 -n 20 --uncertainty",
    )
    add_model(parser)
    parser.add_argument(
        "pictures", type=filled, help="a damaged picture, a folder of damaged pictures, or a file of arrays"
    )
    parser.add_argument("folder", type=expanded, help="the folder to write to; for arrays the file, .npz or .npy")
    add_operators(parser, "damage").add_argument(
        "--operator", type=filled, help="what was done to the pictures; not needed for arrays with gaps or noise"
    )
    parser.add_argument("-n", type=image_count, default=4, help="the number of restorations per picture (default: 4)")
    parser.add_argument(
        "--sigma",
        type=amount,
        default=0.0,
        help="the standard deviation of the noise in the pictures, for pixel values in [0, 1], or in arrays, in their "
        "units (default: 0)",
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
    _add_sizes(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first picture that cannot be restored, before any is (default: leave it out, list it at the "
        "end, and exit with status 2)",
    )
    add_restore_method(parser)
    parser.add_argument(
        "--batch-size",
        type=image_count,
        metavar="IMAGES",
        help="restorations, or tiles, per network call; pictures of the same size are restored together (default: as "
        "many as have about a million values)",
    )
    add_overwrite(parser, "files that exist already")
    parser.add_argument(
        "--skip-existing",
        action="store_true",
        help="leave out the pictures of a folder that are restored already, to continue after an interruption",
    )
    add_classes(parser, rules=False)
    add_condition(parser)
    add_sampling(
        parser,
        "the recommended one of a network that was trained to restore; for any other ode with "
        "--method dpm-solver++ --eta 1",
    )
    parser.set_defaults(run=_run, instead={**parser.get_default("instead"), "--mask": "Write --operator mask:FILE"})


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    """Adds the options for pictures of another size than the network's images."""
    group = parser.add_argument_group(
        "pictures of other sizes",
        "By default a picture is resized to the size of the network's images, and what is missing is enlarged and\n"
        "pasted into it. The picture keeps all that is known. Tiles are for a picture to be enlarged that is as large\n"
        "as the network's images, and for one more than four times as long as wide if what is missing does not fit\n"
        "into a part of the network's aspect ratio.",
    )
    how = group.add_mutually_exclusive_group()
    how.add_argument("--resize", action="store_true", help="resize in any case")
    how.add_argument(
        "--tile",
        type=image_count,
        nargs="?",
        const=0,
        metavar="SIZE",
        help="draw at the resolution of the picture, in overlapping tiles of SIZE x SIZE pixels that agree with each "
        "other; for networks of textures and of parts of photographs (default: the size of the network's images)",
    )
    group.add_argument(
        "--crop",
        type=_crop,
        metavar="center|celeba|LEFT,TOP,WIDTH,HEIGHT",
        help="the part that is resized: the largest one in the center; the 140x140 pixels in the center, for CelebA's "
        "aligned images; or a box in pixels (default: the largest one around what is missing, or the whole picture)",
    )
    group.add_argument(
        "--feather",
        type=fitting(Field(int, low=0)),
        default=0,
        metavar="PIXELS",
        help="blend the known pixels around a hole with the restoration over this distance (default: 0, which keeps "
        "their bits)",
    )


def _crop(text: str) -> str | tuple[int, ...]:
    if text in ("center", "celeba"):
        return text
    if re.fullmatch(r"-?\d+(,-?\d+){3}", text):
        return tuple(map(int, text.split(",")))
    raise argparse.ArgumentTypeError(f"must be center, celeba or LEFT,TOP,WIDTH,HEIGHT in pixels, got {text!r}")


def _run(args: argparse.Namespace) -> None:
    if args.uncertainty and args.n < 2:
        raise ValueError(f"--uncertainty needs several restorations, got -n {args.n}. Write -n 20.")
    if Path(args.pictures).suffix.lower() in FILES:
        restore_arrays(args)
        return
    if args.operator is None:
        args.parser.error("the following arguments are required: --operator")
    refuse(args, ["condition"], "is for arrays")
    operator, paths, folder = as_operator(read_operator(args.operator)), list_pictures(args.pictures), args.folder
    _check_folder(args, folder, paths)
    args.settings = _settings(args, operator)
    if args.skip_existing:
        missing = [path for path in paths if not _is_restored(args, _strip(folder, path))]
        print(f"restored already: {len(paths) - len(missing)} of {count(len(paths), 'picture')}")
        paths = missing
        if not paths:
            return
    if len(paths) > 1:
        args.continues = "add --skip-existing to continue with the other pictures"
    if Path(args.pictures).expanduser().resolve() == folder.resolve():
        raise ValueError(f"the restorations would become pictures of the folder {folder}. Write to another folder.")
    net = load(args)
    label: Any = find_classes(args, net)  # an int or None, without a rule
    assert net.sample_shape is not None  # noqa: S101  (load checks it)
    if args.tile:
        check_size(net.backbone, (args.tile, args.tile), "tile")
    score: Any = net.inference_copy()
    method: Restore = args.restore_method or "auto"
    samplers = {False: make_sampler(args, score, restore=method)}
    check_picture(folder / "strip.png")  # before the work
    # All pictures are read before the first is restored, so that errors come first, and again when they are restored,
    # so that only those of one batch are in memory.
    groups: dict[tuple[bool, object], list[Path]] = {}
    broken: dict[Path, str] = {}
    printed: set[str | None] = {None}
    for path in paths:
        try:
            with about(path):
                picture = _Picture(args, operator, net.sample_shape, path)
        except (OSError, ValueError) as error:
            if args.strict or len(paths) == 1:
                raise
            broken[path] = str(error)
            continue
        for line in (picture.observed(), picture.luma(), picture.difference(*net.sample_shape), *picture.notes()):
            if line not in printed:  # each line once
                print(line)
                printed.add(line)
        groups.setdefault(picture.key(), []).append(path)
    if not groups:
        raise ValueError(f"none of the {len(paths)} pictures can be restored: {next(iter(broken.values()))}")
    if any(key[0] for key in groups):
        tiled = Tiled(score, args.tile or None, batch_size=args.batch_size)
        samplers[True] = make_sampler(args, tiled, restore=method)
    announce(samplers[False])
    for key, group in groups.items():
        together = 1 if key[0] else _TOGETHER if args.batch_size is None else args.batch_size
        at_once = max(1, together // args.n)
        for i in range(0, len(group), at_once):
            batch = [_Picture(args, operator, net.sample_shape, path) for path in group[i : i + at_once]]
            _restore(args, samplers[key[0]], batch, label)
    if args.quiet:
        print(folder)
    for text in broken.values():
        print(f"not restored: {text}")
    if broken:
        raise ValueError(f"{len(broken)} of the {len(paths)} pictures are not restored, as listed above.")


class _Picture:
    """A picture to restore.

    Attributes:
        path: the file.
        degraded: the measurement as an image (1, C, H, W).
        original: the undamaged image (1, C, H, W) with ``--degrade``, otherwise None.
        photo: the measurement for the network.
    """

    def __init__(self, args: argparse.Namespace, operator: Operator, shape: tuple[int, ...], path: Path) -> None:
        self.path, self._given, self._args, channels = path, operator, args, shape[0]
        y = read_image(path, channels)[None]
        operator = fitted(operator, y.shape[-2:])
        if args.degrade:
            operator = operator.drawn(y, [seed_of(args.seed, "mask", path.stem)])
        self._operator = operator
        self.original: Tensor | None = None
        if args.degrade:
            self.original, y = y, operator.measure(y)
            generator = torch.Generator().manual_seed(seed_of(args.seed, "noise", path.stem))
            y = y + args.sigma * torch.randn(y.shape, generator=generator)
        elif not _measures(operator, y, channels):
            y = read_image(path, 1)[None]
        self._y = y
        Observation(operator, y, args.sigma)  # raises if they do not fit together
        shown = operator.as_image(y)
        if shown.ndim == y.ndim == 4 and shown.shape[1] != channels:
            drawn, needed = ("gray", "RGB") if channels == 1 else ("RGB", "gray")
            raise ValueError(
                f"{args.operator} needs a network that draws {needed} images, and {args.model} draws {drawn} ones."
            )
        self.photo = Photograph(
            operator,
            y,
            (channels, args.tile, args.tile) if args.tile else shape,
            sigma=args.sigma,
            crop=args.crop,
            tile=False if args.resize else None if args.tile is None else True,
            feather=args.feather,
        )
        self.degraded = image_of(operator, y, self.photo.shape)

    def key(self) -> tuple[bool, object]:
        """Whether the picture needs tiles, and a value that is equal for pictures that can be restored in one batch."""
        observation = self.photo.observation
        operator, common = observation.operator, (observation.y.shape, observation.sigma)
        if operator is self._given:
            return self.photo.tile, common
        if isinstance(operator, Mask):  # ``_restore`` has one for each picture
            return self.photo.tile, (Mask, common)
        # Without a gain the mask is not that of all parts, such as those that were drawn for this picture.
        if operator.text() is None and (operator.mask is None or operator.gain is None):
            return self.photo.tile, self.path
        mask = b"" if operator.mask is None else np.asarray(operator.mask).tobytes()
        return self.photo.tile, (common, repr(operator), mask)

    def observed(self) -> str | None:
        """A line with the share of the image that is observed; None if all of it is."""
        share = float(self._operator.seen(self._y).float().mean())
        digits = ".0f" if 0.01 < share < 0.99 else ".4g"
        return None if share == 1 else f"{100 * share:{digits}} % of the image is observed with {self._args.operator}"

    def luma(self) -> str | None:
        """A line if a picture in color is restored from its luma, otherwise None."""
        if self.original is not None or self._y.shape[1] == self.degraded.shape[1] or not self._in_color():
            return None
        return f"the luma of pictures in color is taken, since {self._args.operator} measures gray images"

    def _in_color(self) -> bool:
        rgb = read_image(self.path, 3)
        return not torch.equal(rgb, rgb[:1].expand_as(rgb))

    def difference(self, channels: int, height: int, width: int) -> str | None:
        """A line with size and color if they differ from those of the network's images, otherwise None."""
        own = color = "color" if channels == 3 else "gray"
        if self._y.shape[1] == self.degraded.shape[1]:
            color = "color" if self._in_color() else "gray"
        photo = self.photo
        if photo.shape[1:] == (height, width) and color == own and not photo.tile:
            return None
        found = f"the image to restore has {_size(photo.shape)} pixels in {color}"
        own = f"{found}; images of {self._args.model} have {height}x{width} pixels in {own}"
        if photo.resized:
            part = f"{photo.box.height}x{photo.box.width} pixels at left {photo.box.left}, top {photo.box.top}"
            tiles = photo.shape[1] >= height and photo.shape[2] >= width
            also = " (--tile draws at full resolution, for networks of textures)" if tiles else ""
            return f"{own}: resized, {part}{also}"
        side = (self._args.tile, self._args.tile) if self._args.tile else (height, width)
        return f"{own}: in tiles of {_size(side)} pixels" if photo.tile else own

    def notes(self) -> list[str]:
        """Lines about what of the file is not used."""
        with open_picture(self.path) as file:
            frames, mode, deep = getattr(file, "n_frames", 1), file.mode, is_deep(file)
            clear = file.has_transparency_data and file.convert("RGBA").getextrema()[3][0] < 255
        notes = {
            f"only the first of its {frames} pictures is restored": frames > 1,
            f"its colors are converted from {mode} to RGB": mode in _OTHER_COLORS,
            "its transparent pixels count as black": clear,
            "its values are rounded to 8 bits in the files that are written": deep,
        }
        return [f"{self.path}: {note}" for note, true in notes.items() if true]


def _restore(args: argparse.Namespace, sampler: Sampler, pictures: list[_Picture], label: int | None) -> None:
    """Restores pictures with one operator, or with masks, in one call of the sampler, and writes the results.

    Each restoration has its own generator, and does not depend on the other pictures.
    """
    folder, given = args.folder, pictures[0].photo.observation
    operator = given.operator
    if isinstance(operator, Mask) and len(pictures) > 1:
        operators = [picture.photo.observation.operator for picture in pictures]
        masks = [each.mask.expand_as(given.y) for each in operators if isinstance(each, Mask)]
        operator = Mask(torch.cat(masks).repeat_interleave(args.n, 0))
    y = torch.cat([picture.photo.observation.y for picture in pictures]).repeat_interleave(args.n, 0)
    seeds = [seed_of(args.seed, "restoration", picture.path.stem, k) for picture in pictures for k in range(args.n)]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    condition: Any = label
    if takes_image(sampler.net):
        condition = with_image(condition_of(operator, y, generators), label, sampler.net)
    observation = Observation(operator, y, given.sigma)
    options = {"condition": condition, "generator": generators, "batch_size": args.batch_size}
    notes = [""] * len(pictures)
    if isinstance(sampler, ParticleSampler):
        population = sampler.population(observation, **options, progress=not args.quiet)
        images, evidence = population.samples, population.log_evidence.view(-1, args.n).logsumexp(1) - math.log(args.n)
        notes = [f": log p(y) {each:.1f}" for each in evidence.tolist()]
    else:
        images = sampler.sample(observation=observation, **options, progress=not args.quiet)
    for picture, restored, note in zip(pictures, images.cpu().split(args.n), notes, strict=True):
        strip, pasted = [_shown(picture.degraded.clamp(0, 1))], []
        for k, image in enumerate(restored.split(1), 1):
            image = picture.photo.restored(image)
            save_image(image[0], folder / f"{picture.path.stem}-{k}.png")
            strip.append(_shown(image))
            pasted += [image] if args.uncertainty else []
        if picture.original is not None:
            strip.append(_shown(picture.original))
        if args.uncertainty:
            _summarize(torch.cat(pasted), folder, picture.path.stem)
        # The last file, by which --skip-existing knows that the picture is restored.
        save_image(grid(torch.cat(strip), columns=len(strip)), _strip(folder, picture.path), comment=args.settings)
        if note or not args.quiet:
            print(f"{_strip(folder, picture.path)}{note}")


def _shown(image: Tensor) -> Tensor:
    """A picture (1, C, H, W), made smaller if it is large."""
    scale = _SHOWN / max(image.shape[-2:])
    size = [max(1, int(scale * side)) for side in image.shape[-2:]]
    return image if scale >= 1 else torch.nn.functional.interpolate(image, size, mode="area")


def _summarize(restored: Tensor, folder: Path, stem: str) -> None:
    """Writes the mean of the restorations (K, C, H, W), the map of their deviation over the channels, and numbers."""
    found = summary(restored)
    save_image(found.mean, folder / f"{stem}-mean.png")
    save_image(found.deviation_map(), folder / f"{stem}-deviation.png")
    write_arrays(folder / f"{stem}-uncertainty.npz", found._asdict())


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
        check_new((folder / f"{picture.stem}-{name}" for name in results), args.overwrite or args.skip_existing)


def _strip(folder: Path, picture: Path) -> Path:
    """The strip of a picture."""
    return folder / f"{picture.stem}-strip.png"


def _is_restored(args: argparse.Namespace, strip: Path) -> bool:
    """Whether there is a strip that can be read; raises if it was made with other settings."""
    try:
        with open_picture(strip) as file:
            same = file.info.get("Comment", args.settings) == args.settings
    except OSError:  # no such file, or not a picture
        return False
    if not same:
        raise ValueError(
            f"{strip} was made with other settings. Write to another folder, or replace --skip-existing by --overwrite."
        )
    return True


def _settings(args: argparse.Namespace, operator: Operator) -> str:
    """A hash of the options on which the results depend, and of the masks, whose files may have changed."""
    options = {name: str(value) for name, value in vars(args).items() if name not in _WITHOUT_EFFECT}
    masks = [hash_of_bytes(part.mask.numpy().tobytes()) for part in operator.parts() if isinstance(part, Mask)]
    return hash_of([options, masks])


def _size(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"
