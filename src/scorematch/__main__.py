"""The command line: ``python -m scorematch sample mnist digits.png``."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet, __version__
from scorematch.cards import table
from scorematch.convert import convert
from scorematch.images import check_picture, grid, list_pictures, read_image, read_mask, save_grid, save_image
from scorematch.observe import JPEG, AveragePool, Grayscale, Mask, Observation, Operator, Uncrop
from scorematch.palette import condition_of
from scorematch.sampling.restoration import Restore


def _sample(args: argparse.Namespace) -> None:
    sampler, shape = _sampler(args)
    if _is_shown_images(sampler, shape[0]):
        raise ValueError(f"{args.model} restores images that it is shown: write python -m scorematch restore.")
    check_picture(args.picture)  # before minutes of work, not after
    _announce(sampler, args.n, shape, args.device)
    begin = time.perf_counter()
    images = sampler.sample(args.n, generator=torch.Generator().manual_seed(args.seed), progress=not args.quiet)
    print(f"{args.n} images in {time.perf_counter() - begin:.1f} s")
    save_grid(images, args.picture, args.columns)
    print(args.picture)


def _restore(args: argparse.Namespace) -> None:
    sampler, shape = _sampler(args)
    operator, channels = _operator(args), shape[0]
    if args.gray and channels != 3:
        raise ValueError(f"--gray is for networks of RGB images; {args.model} is of {channels} channel.")
    pictures = list_pictures(args.pictures)
    originals = None if args.original is None else list_pictures(args.original)
    if originals is not None and len(originals) != len(pictures):
        raise ValueError(f"there are {len(pictures)} pictures to restore, but {len(originals)} originals.")
    folder = Path(args.folder)
    for picture in pictures:
        names = [*(f"{picture.stem}-{i + 1}.png" for i in range(args.n)), f"{picture.stem}-strip.png"]
        if taken := [name for name in names if (folder / name).exists()]:
            raise ValueError(f"{folder / taken[0]} exists already, and is left as it is: name another folder.")
    check_picture(folder / "strip.png")
    generator = torch.Generator().manual_seed(args.seed)
    palette = _is_shown_images(sampler, channels)
    for i, picture in enumerate(pictures):
        original = None if originals is None else read_image(originals[i], channels)[None]
        y = read_image(picture, 1 if args.gray and not args.degrade else channels)[None]
        if args.degrade:
            original = y
            y = operator.measure(y)
            y = y + args.sigma * torch.randn(y.shape, generator=generator)
        observation = Observation(operator, y, args.sigma)
        seen = y.expand(-1, channels, -1, -1) if args.gray else operator.lift(y)  # as a picture
        # A network of Palette's kind is shown it as well.
        condition = condition_of(operator, y.expand(args.n, -1, -1, -1), generator) if palette else None
        if i == 0:
            _announce(sampler, args.n * len(pictures), tuple(seen.shape[1:]), args.device, condition)
        images = sampler.sample(
            args.n, condition=condition, observation=observation, generator=generator, progress=not args.quiet
        ).cpu()
        for k, image in enumerate(images, 1):
            save_image(image, folder / f"{picture.stem}-{k}.png")
        strip = [seen, images] if original is None else [seen, images, _like(original, images)]
        save_image(grid(torch.cat(strip), columns=sum(map(len, strip))), folder / f"{picture.stem}-strip.png")
        print(folder / f"{picture.stem}-strip.png")


def _sampler(args: argparse.Namespace) -> tuple[AnnealedLangevinSampler, tuple[int, ...]]:
    """The sampler that the options describe, and the shape of what it samples."""
    if args.n < 1:
        raise ValueError(f"n must be at least 1, got {args.n}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"there is no {args.device} here: this torch sees no CUDA device. Leave --device out for the CPU."
        )
    net = ScoreNet.from_pretrained(args.model).to(args.device)
    if net.sample_shape is None:
        raise ValueError(f"{args.model} does not say what a sample looks like: its configuration has no sample_shape.")
    sampler = AnnealedLangevinSampler(
        net,
        None if args.levels is None else net.schedule.respaced(args.levels),
        steps_per_level=args.steps_per_level,
        step_size=args.step_size,
        exact_noise=args.exact_noise,
        consistent=args.consistent,
        restore=getattr(args, "method", "replace"),
    )
    return sampler, net.sample_shape


def _is_shown_images(sampler: AnnealedLangevinSampler, channels: int) -> bool:
    """Whether the network takes an image as its condition, beside one of so many channels."""
    return bool(sampler.net.config.get("in_channels", 0) > channels)  # type: ignore[attr-defined]  # a ScoreNet


def _operator(args: argparse.Namespace) -> Operator:
    if args.mask is not None:
        return Mask(read_mask(args.mask))
    if args.uncrop is not None:
        return _uncrop(args.uncrop)
    if args.gray:
        return Grayscale()
    return AveragePool(args.pool) if args.pool is not None else JPEG(args.jpeg)


def _uncrop(text: str) -> Uncrop:
    """Of such as "left=4,right=4"."""
    borders = dict(part.partition("=")[::2] for part in text.split(","))
    if not borders.keys() <= {"left", "right", "top", "bottom"} or not all(map(str.isdigit, borders.values())):
        raise ValueError(f"--uncrop takes sides and pixels, such as left=4,right=4, got {text!r}.")
    return Uncrop(**{side: int(pixels) for side, pixels in borders.items()})


def _like(original: Tensor, images: Tensor) -> Tensor:
    if original.shape[1:] != images.shape[1:]:
        size, other = ("x".join(map(str, t.shape[-2:])) for t in (original, images))
        raise ValueError(f"the original has {size} pixels, the restored picture {other}.")
    return original


def _announce(
    sampler: AnnealedLangevinSampler, n: int, shape: tuple[int, ...], device: str, condition: Tensor | None = None
) -> None:
    print(sampler)
    seconds = _estimate(sampler, n, shape, device, condition)
    print(f"about {_duration(seconds)} for {n} image{'s' if n > 1 else ''}")


def _estimate(
    sampler: AnnealedLangevinSampler, n: int, shape: tuple[int, ...], device: str, condition: Tensor | None
) -> float:
    """How many seconds n images will take: their share of network calls, at the pace of one call that is made here."""
    few = min(n if condition is None else len(condition), max(1, 2**16 // math.prod(shape)))
    x = torch.rand(few, *shape, device=device)
    beside = () if condition is None else (condition[:few].to(device),)
    score = sampler.net.inference_copy()  # type: ignore[attr-defined]  # a ScoreNet, and this is what the sampler calls
    with torch.no_grad():
        score(x, 1.0, *beside).sum().item()  # the first call prepares the kernels
        begin = time.perf_counter()
        score(x, 1.0, *beside).sum().item()  # item waits for the device
    return (time.perf_counter() - begin) * len(sampler) * n / few


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _models(args: argparse.Namespace) -> None:
    print(table())


def _convert(args: argparse.Namespace) -> None:
    net = convert(args.checkpoint, args.folder, config=args.config, raw=args.raw)
    print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {net.schedule}")
    print(args.folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scorematch", description="Score-based image generation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    chain = argparse.ArgumentParser(add_help=False)  # the options of all commands that sample
    chain.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (0)")
    chain.add_argument("--device", default="cpu", help="such as cuda or mps (cpu)")
    chain.add_argument("--levels", type=int, help="noise levels (the network's recommendation)")
    chain.add_argument("--steps-per-level", type=int, help="Langevin steps at each level (likewise)")
    chain.add_argument("--step-size", type=float, help="epsilon, the step at the quietest level (likewise)")
    chain.add_argument(
        "--exact-noise", action=argparse.BooleanOptionalAction, help="noise of variance 2a - a^2 (likewise)"
    )
    chain.add_argument(
        "--consistent",
        action=argparse.BooleanOptionalAction,
        help="one step a level, with the noise it lacks (likewise)",
    )
    chain.add_argument("--quiet", action="store_true", help="no progress bar")

    sample = commands.add_parser(
        "sample", parents=[chain], help="draw images with a trained network and save them as one picture"
    )
    sample.add_argument("model", help='a short name, such as "mnist", or a folder')
    sample.add_argument("picture", help="the file to write, such as digits.png")
    sample.add_argument("-n", type=int, default=64, help="how many images (64)")
    sample.add_argument("--columns", type=int, help="images in a row (about as many as rows)")
    sample.set_defaults(run=_sample)

    restore = commands.add_parser(
        "restore", parents=[chain], help="fill holes, extend, color, sharpen or clean pictures with a trained network"
    )
    restore.add_argument("model", help='a short name, such as "mnist", or a folder')
    restore.add_argument("pictures", help="a picture, or a folder of pictures, that something was done to")
    restore.add_argument("folder", help="where to write the restored pictures, and a strip of each")
    done = restore.add_argument_group("what was done to them").add_mutually_exclusive_group(required=True)
    done.add_argument("--mask", help="parts are missing; a picture of the same size, white where the image was seen")
    done.add_argument("--uncrop", metavar="SIDES", help="borders are missing, such as left=4,right=4 (pixels)")
    done.add_argument("--gray", action="store_true", help="colors are missing")
    done.add_argument("--pool", type=int, metavar="SIZE", help="they were made smaller by averaging blocks")
    done.add_argument("--jpeg", type=int, metavar="QUALITY", help="they were stored as JPEG, of a quality in 1..100")
    restore.add_argument("--sigma", type=float, default=0.0, help="the noise in them, of pixels in [0, 1] (0)")
    restore.add_argument("--degrade", action="store_true", help="they are whole: do it to them first, then compare")
    restore.add_argument("--original", help="the whole picture, or a folder of them, to compare with")
    restore.add_argument("-n", type=int, default=4, help="how many restorations of each (4)")
    restore.add_argument(
        "--method",
        choices=get_args(Restore),
        default="replace",
        help="how what was seen is held to (replace); guide-jacobian is better, and takes twice as long",
    )
    restore.set_defaults(run=_restore)

    models = commands.add_parser("models", help="list the networks that are known by name, and what is known of them")
    models.set_defaults(run=_models)
    conversion = commands.add_parser("convert", help="turn a checkpoint of the papers' authors into a folder")
    conversion.add_argument("checkpoint", help="checkpoint_<step>.pth of NCSN, NCSNv2 or adversarial score matching")
    conversion.add_argument("folder", help="where to write config.json and the weights")
    conversion.add_argument("--config", help="the config.yml that it was trained with")
    conversion.add_argument("--raw", action="store_true", help="the weights themselves, not their moving average")
    conversion.set_defaults(run=_convert)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; an expected failure is one line on stderr and exit code 1."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"scorematch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("scorematch: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
