"""Learns a prior of digits from digits of which half of the pixels were never seen, and the others only with noise.

    python examples/incomplete_digits.py --data FOLDER --out runs/half
    python examples/incomplete_digits.py --data FOLDER --out runs/quarter --missing 0.75
    python examples/incomplete_digits.py --data FOLDER --out runs/half --stages 12      # four more stages

It prints the error of held-out values by stage, and two Frechet distances of samples from test digits: of the prior,
and of the same network after a training on as many clean digits for as many images.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from mnist import load_digits
from torch import Tensor

from scorematch import ScoreNet
from scorematch.evaluation import evaluate
from scorematch.restoration import Observation
from scorematch.sampling import ODESampler
from scorematch.training import train, train_from_observations


def measure(digits: Tensor, missing: float, sigma: float) -> Observation:
    """Noisy digits (N, 1, 28, 28) with gaps at random pixels, other ones for each digit."""
    generator = torch.Generator().manual_seed(0)
    y = digits + sigma * torch.randn(digits.shape, generator=generator)
    return Observation.with_gaps(y, sigma, mask=torch.rand(digits.shape, generator=generator) >= missing)


def build() -> ScoreNet:
    """A small U-Net, whose coarse layers process patches of 2 x 2 pixels."""
    torch.manual_seed(0)
    return ScoreNet.unet(1, 28, widths=(48, 64), layers_per_block=1, patch=2)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/half"), help="folder of the stages")
    parser.add_argument("--missing", type=float, default=0.5, help="the fraction of pixels that are not seen")
    parser.add_argument("--sigma", type=float, default=0.1, help="the noise of the others")
    parser.add_argument("--digits", type=int, default=10_000, help="the number of digits")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--images", type=int, default=200_000, help="the length of a stage")
    parser.add_argument("--levels", type=int, default=18, help="the noise levels of the draws")
    parser.add_argument("--features", default="efficientnet-lite0", help="the features of the Frechet distance")
    parser.add_argument("--samples", type=int, default=2000, help="samples for the Frechet distance")
    parser.add_argument("--smoke", action="store_true", help="one stage of a few steps, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.digits, args.stages, args.images, args.levels, args.features, args.samples = 40, 1, 64, 2, "pixels", 8

    digits = load_digits(args.data, "train")[0][: args.digits].float() / 255
    options = {"augment": (), "lr": 2e-3, "batch_size": min(64, args.digits // 2), "ema": (0.05,)}
    sampler = partial(ODESampler, method="dpm-solver++", eta=1.0, levels=args.levels, restore="moment-matching")
    prior = train_from_observations(
        build(),
        measure(digits, args.missing, args.sigma),
        args.out,
        stages=args.stages,
        images=args.images,
        sampler=sampler,
        **options,
    )
    print((args.out / "report.md").read_text())
    clean = train(build(), digits, args.out / "clean", images=args.stages * args.images, **options)
    test = load_digits(args.data, "test")[0]
    for name, net in (("incomplete", prior), ("clean", clean)):
        found = evaluate(net, test, n=args.samples, features=args.features, metrics=["frechet"], progress=False)
        print(name, found.table(), sep="\n")


if __name__ == "__main__":
    main()
