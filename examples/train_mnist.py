"""Trains a network on the 60,000 handwritten digits of MNIST. The network "mnist" of the package is one of them.

    python examples/train_mnist.py --data FOLDER --out runs/mnist                    # a small NCSNv2, as it ships
    python examples/train_mnist.py --data FOLDER --out runs/mnist                    # continues an interrupted run
    python examples/train_mnist.py --data FOLDER --out runs/more --start mnist       # starts from trained weights
    python examples/train_mnist.py --data FOLDER --out runs/unet --network unet      # a U-Net, row "karras"
    python examples/train_mnist.py --data FOLDER --out runs/ddpm --network ddpm      # a DDPM: noise, 1,000 time steps

``scorematch.training.train`` writes the network, samples and a log into the folder. The log also has the loss on test
digits. Compare it with D/2 = 392, the loss of a score of zero.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mnist import load_digits
from torch import Tensor

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.sampling import SamplerSettings
from scorematch.training import LevelMixture, LogNormal, train

# Chosen on the trained network with tune_mnist.py. The step is 0.5 sigma_min^2.
SETTINGS = SamplerSettings(levels=100, step_size=5e-5, consistent=True)
CENTER = 0.5  # the noise level at which it is decided which digit a sample becomes


def build(network: str, images: Tensor, width: int | None) -> ScoreNet:
    """A network to train. Its noise levels follow from the images, except those of a DDPM."""
    width = width or (24 if network == "ncsnv2" else 32)
    if network == "ddpm":
        schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
        return ScoreNet.unet(1, 28, widths=(width, 2 * width, 2 * width), schedule=schedule, precondition="ddpm")
    schedule = NoiseSchedule.from_data(images, max_images=len(images))
    if network == "unet":
        return ScoreNet.unet(1, 28, widths=(width, 2 * width, 2 * width), schedule=schedule)
    net = ScoreNet.ncsnv2(1, 28, width=width, depth="deeper", schedule=schedule, precondition="karras")
    net.sampler_settings = SETTINGS
    return net


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="folder of the run")
    parser.add_argument("--network", default="ncsnv2", choices=["ncsnv2", "unet", "ddpm"])
    parser.add_argument("--start", help="a trained network to start from, a name or a folder, instead of a new one")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; it falls to 0")
    parser.add_argument("--width", type=int, help="channels of the first features (default: 24; U-Net: 32)")
    parser.add_argument("--every", type=int, default=2000, help="steps between pictures and test losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch, args.width, args.every = 4, 8, 4, 4

    digits = load_digits(args.data, "train")[0]
    test = load_digits(args.data, "test")[0][: 16 if args.smoke else 1000].float() / 255
    torch.manual_seed(args.seed)
    if args.start is None:
        net = build(args.network, digits[: 200 if args.smoke else None].float() / 255, args.width)
    else:
        net = ScoreNet.from_pretrained(args.start)
    print(f"{net.schedule}, {sum(p.numel() for p in net.parameters()):,} parameters, D/2 = {test[0].numel() / 2:g}")

    def test_loss(averaged: ScoreNet, images: int) -> dict[str, float]:
        x = test.to(next(averaged.parameters()).device)
        return {"test loss": float(dsm_loss(averaged, x, generator=0))}

    # A DDPM is trained at all its levels equally often, as by Ho et al.
    levels = None if net.precondition == "ddpm" else LevelMixture((net.schedule, LogNormal(math.log(CENTER), 1)))
    train(
        net,
        digits,
        args.out,
        start=args.start,
        images=args.steps * args.batch,
        batch_size=args.batch,
        lr=args.lr,
        levels=levels,
        augment=(),
        seed=args.seed,
        sample_every=args.every * args.batch,
        evaluate=test_loss,
    )


if __name__ == "__main__":
    main()
