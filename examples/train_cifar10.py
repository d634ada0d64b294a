"""Trains a small U-Net on the 50,000 images of CIFAR-10, with the noise levels of a DDPM.

    python examples/train_cifar10.py --data FOLDER --out runs/cifar10
    python examples/tune_cifar10.py --data FOLDER --model runs/cifar10/network      # compares sampler settings on it

The network is like google/ddpm-cifar10-32, with a thirteenth of the parameters and the row "karras" of the
preconditioning table. It trains in 81 minutes on one core, which is enough for colors and textures, but not for
objects. The sampler settings that are recommended for DDPMs of the Hub were tested on it. The same command continues an
interrupted run. Compare the loss on test images, which is in the log, with D/2 = 1536, the loss of a score of zero.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from cifar10 import load_images

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.training import LevelMixture, LogNormal, train


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; it falls to 0")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help="channels at each scale")
    parser.add_argument("--every", type=int, default=500, help="steps between pictures and test losses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch, args.widths, args.every = 4, 8, [4, 4], 2

    images = load_images(args.data, "train")[0]
    test = load_images(args.data, "test")[0][: 16 if args.smoke else 1000].float() / 255
    torch.manual_seed(args.seed)
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    net = ScoreNet.unet(3, 32, widths=args.widths, layers_per_block=1, schedule=schedule)
    print(f"{net.schedule}, {sum(p.numel() for p in net.parameters()):,} parameters, D/2 = {test[0].numel() / 2:g}")

    def test_loss(averaged: ScoreNet, images: int) -> dict[str, float]:
        x = test.to(next(averaged.parameters()).device)
        return {"test loss": float(dsm_loss(averaged, x, generator=0))}

    train(
        net,
        images,
        args.out,
        images=args.steps * args.batch,
        batch_size=args.batch,
        lr=args.lr,
        levels=LevelMixture((schedule, LogNormal(math.log(0.15), 1.2))),
        seed=args.seed,
        sample_every=args.every * args.batch,
        evaluate=test_loss,
    )


if __name__ == "__main__":
    main()
