"""The command line: ``python -m scorematch sample mnist digits.png``."""

from __future__ import annotations

import argparse
import math
import sys
import time

import torch

from scorematch import AnnealedLangevinSampler, ScoreNet, __version__
from scorematch.cards import table
from scorematch.convert import convert
from scorematch.images import check_picture, save_grid


def _sample(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise ValueError(f"n must be at least 1, got {args.n}.")
    # Convolutions of a CPU and of a GPU's tensor cores run about twice as fast in channels_last.
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"there is no {args.device} here: this torch sees no CUDA device. Leave --device out for the CPU."
        )
    net = ScoreNet.from_pretrained(args.model).to(args.device)
    if net.sample_shape is None:
        raise ValueError(f"{args.model} does not say what a sample looks like: its configuration has no sample_shape.")
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs do not know it
    schedule = None if args.levels is None else net.schedule.respaced(args.levels)
    sampler = AnnealedLangevinSampler(
        net, schedule, steps_per_level=args.steps_per_level, step_size=args.step_size, exact_noise=args.exact_noise
    )
    check_picture(args.picture)  # before minutes of work, not after
    print(sampler)
    seconds = _estimate(sampler, args.n, net.sample_shape, args.device)
    print(f"about {_duration(seconds)} for {args.n} image{'s' if args.n > 1 else ''}")
    begin = time.perf_counter()
    images = sampler.sample(args.n, generator=torch.Generator().manual_seed(args.seed), progress=not args.quiet)
    print(f"{args.n} images in {time.perf_counter() - begin:.1f} s")
    save_grid(images, args.picture, args.columns)
    print(args.picture)


def _estimate(sampler: AnnealedLangevinSampler, n: int, shape: tuple[int, ...], device: str) -> float:
    """How many seconds n images will take: their share of network calls, at the pace of one call that is made here."""
    few = min(n, max(1, 2**16 // math.prod(shape)))
    x = torch.rand(few, *shape, device=device)
    with torch.no_grad():
        sampler.net(x, 1.0).sum().item()  # the first call prepares the kernels
        begin = time.perf_counter()
        sampler.net(x, 1.0).sum().item()  # item waits for the device
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
    sample = commands.add_parser("sample", help="draw images with a trained network and save them as one picture")
    sample.add_argument("model", help='a short name, such as "mnist", or a folder')
    sample.add_argument("picture", help="the file to write, such as digits.png")
    sample.add_argument("-n", type=int, default=64, help="how many images (64)")
    sample.add_argument("--seed", type=int, default=0, help="the same seed draws the same images (0)")
    sample.add_argument("--columns", type=int, help="images in a row (about as many as rows)")
    sample.add_argument("--device", default="cpu", help="such as cuda or mps (cpu)")
    sample.add_argument("--levels", type=int, help="noise levels (the network's recommendation)")
    sample.add_argument("--steps-per-level", type=int, help="Langevin steps at each level (likewise)")
    sample.add_argument("--step-size", type=float, help="epsilon, the step at the quietest level (likewise)")
    sample.add_argument(
        "--exact-noise", action=argparse.BooleanOptionalAction, help="noise of variance 2a - a^2 (likewise)"
    )
    sample.add_argument("--quiet", action="store_true", help="no progress bar")
    sample.set_defaults(run=_sample)
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
