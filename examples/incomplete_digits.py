"""Learns a prior of digits from digits of which half of the pixels were never seen, and the others only with noise.

    python examples/incomplete_digits.py --data FOLDER --out runs/half
    python examples/incomplete_digits.py --data FOLDER --out runs/quarter --missing 0.75
    python examples/incomplete_digits.py --data FOLDER --out runs/half --stages 12      # four more stages

It prints the error of held-out values by stage, and two Frechet distances of samples from test digits: that of the
prior, and that of the same network trained as long on as many clean digits. The features are the means of 2 x 2 pixels.
The first command takes about half an hour of one core.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mnist import load_digits
from torch import Tensor

from scorematch import ScoreNet
from scorematch.evaluation import evaluate
from scorematch.restoration import Observation
from scorematch.sampling import ODESampler, SamplerSettings
from scorematch.training import train, train_from_observations


def measure(digits: Tensor, missing: float, sigma: float) -> Observation:
    """Noisy digits (N, 1, 28, 28) with gaps at random pixels, other ones for each digit."""
    generator = torch.Generator().manual_seed(0)
    y = digits + sigma * torch.randn(digits.shape, generator=generator)
    return Observation.with_gaps(y, sigma, mask=torch.rand(digits.shape, generator=generator) >= missing)


def build() -> ScoreNet:
    """A small U-Net, whose coarse layers process patches of 4 x 4 pixels."""
    torch.manual_seed(0)
    return ScoreNet.unet(1, 28, widths=(32, 64), layers_per_block=1, patch=4)


def means(images: Tensor) -> Tensor:
    """The means of 2 x 2 pixels of images (N, 1, 28, 28), uint8: features (N, 196) in [0, 1]."""
    return F.avg_pool2d(images.float() / 255, 2).flatten(1)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST")
    parser.add_argument("--out", type=Path, default=Path("runs/half"), help="folder of the stages")
    parser.add_argument("--missing", type=float, default=0.5, help="the fraction of pixels that are not seen")
    parser.add_argument("--sigma", type=float, default=0.1, help="the noise of the others")
    parser.add_argument("--digits", type=int, default=2000, help="the number of digits")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--images", type=int, default=12_000, help="the length of a stage")
    parser.add_argument("--levels", type=int, default=8, help="the noise levels of the draws")
    parser.add_argument("--samples", type=int, default=500, help="samples for the Frechet distance")
    parser.add_argument("--smoke", action="store_true", help="one stage of a few steps, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.digits, args.stages, args.images, args.levels, args.samples = 40, 1, 64, 2, 8

    digits = load_digits(args.data, "train")[0][: args.digits].float() / 255
    options = {"augment": (), "optimizer": "muon", "lr": 0.01, "batch_size": min(32, args.digits // 2), "ema": (0.05,)}
    measured = measure(digits, args.missing, args.sigma)
    sampler = partial(ODESampler, levels=args.levels, restore="shift")
    stages = {"stages": args.stages, "images": args.images, "sampler": sampler, "held_out": args.digits // 20}
    prior = train_from_observations(build(), measured, args.out, **stages, **options)
    print((args.out / "report.md").read_text("utf-8"))
    clean = train(build(), digits, args.out / "clean", images=args.stages * args.images, **options)
    test, ten = load_digits(args.data, "test")[0][:2000], SamplerSettings("ode", levels=10, method="dpm-solver++")
    options = {"features": means, "metrics": ["frechet"], "cache": False, "progress": False}
    for name, net in (("incomplete", prior), ("clean", clean)):
        found = evaluate(net, test, n=args.samples, sampler=ten, **options)
        print(name, found.table(), sep="\n")


if __name__ == "__main__":
    main()
