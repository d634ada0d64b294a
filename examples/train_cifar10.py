"""Trains a small U-Net on the 50,000 images of CIFAR-10, with the noise levels of a DDPM.

    python examples/train_cifar10.py --data FOLDER --out runs/cifar10
    python examples/tune_cifar10.py --data FOLDER --model runs/cifar10/network      # compares sampler settings on it

The network is like google/ddpm-cifar10-32, with a thirteenth of the parameters and the row "karras" of the
preconditioning table. It trains in 81 minutes on one core, which is enough for colors and textures, but not for
objects. The sampler settings that are recommended for DDPMs of the Hub were tested on it. The loss is to be compared
with D/2 = 1536, the loss of a network that returns zero. A run that was stopped continues from its last checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from cifar10 import load_images
from torch import Tensor
from training import draw_levels, held_out_loss, train, weighting

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.images import save_grid
from scorematch.sampling import ODESampler


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder for checkpoints and pictures")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; it falls to 0")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help="channels at each scale")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch, args.widths, args.every = 4, 8, [4, 4], 2

    torch.manual_seed(args.seed)
    images = load_images(args.data, "train")[0].to(args.device)  # 154 MB: all images stay on the device
    test = load_images(args.data, "test")[0][: 16 if args.smoke else 1000].to(args.device).float() / 255
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    net = ScoreNet.unet(3, 32, widths=args.widths, layers_per_block=1, schedule=schedule).to(args.device)
    print(f"{net.schedule}, {sum(p.numel() for p in net.parameters()):,} parameters, D/2 = {test[0].numel() / 2:g}")

    def loss(net: ScoreNet) -> Tensor:
        batch = images[torch.randint(len(images), (args.batch,), device=args.device)]
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        batch = (batch.float() / 255).to(memory_format=torch.channels_last)
        sigma = draw_levels(len(batch), net.schedule, batch.device, center=0.15, spread=1.2)
        return dsm_loss(net, batch, sigma=sigma, weighting=weighting)

    def report(averaged: ScoreNet, step: int) -> dict[str, float]:
        sampler = ODESampler(averaged, levels=3 if args.smoke else 18)
        save_grid(sampler.sample(16, generator=0, progress=False), args.out / f"samples-{step:06d}.png")
        return {"images": step * args.batch, "test loss": round(held_out_loss(averaged, test), 3)}

    train(net, loss, report, args.out, steps=args.steps, every=args.every, lr=args.lr)


if __name__ == "__main__":
    main()
