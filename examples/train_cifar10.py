"""Trains a small U-Net on the 50,000 images of CIFAR-10, on the noise levels of a DDPM.

    python examples/train_cifar10.py --data FOLDER --out runs/cifar10
    python examples/tune_cifar10.py --data FOLDER --model runs/cifar10/network      # which sampler settings suit it

It is a small relative of google/ddpm-cifar10-32: a thirteenth of the parameters, the row "karras" of the
preconditioning table, and 81 minutes of training on one core, which is enough for colors and textures, not for objects.
The sampler settings that come with the Hub's DDPMs were tried on it. The loss stands beside D/2 = 1536, which is what a
network that knows nothing scores. A run that was stopped goes on from its last checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from cifar10 import load_images
from torch import Tensor
from train_mnist import held_out_loss, weighting
from training import train

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.images import save_grid
from scorematch.sampling import ODESampler


def draw_levels(n: int, schedule: NoiseSchedule) -> Tensor:
    """Half at all levels alike, half where most is to be learned: log-normal, as Karras et al. (2022) draw them."""
    anywhere = schedule.sigmas[torch.randint(len(schedule), (n,))]
    about = (0.15 * (1.2 * torch.randn(n)).exp()).clamp(schedule.sigmas[-1], schedule.sigmas[0])
    return torch.where(torch.arange(n) % 2 == 0, anywhere, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"), help="folder for checkpoints and pictures")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; 0 at the last step")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128], help="of the features at each scale")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, to see that all runs")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch, args.widths, args.every = 4, 8, [4, 4], 2

    torch.manual_seed(args.seed)
    images = load_images(args.data, "train")[0].to(args.device)  # 154 MB: the whole set stays on the device
    test = load_images(args.data, "test")[0][: 16 if args.smoke else 1000].to(args.device).float() / 255
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    net = ScoreNet.unet(3, 32, widths=args.widths, layers_per_block=1, schedule=schedule).to(args.device)
    print(f"{net.schedule}, {sum(p.numel() for p in net.parameters()):,} parameters, D/2 = {test[0].numel() / 2:g}")

    def loss(net: ScoreNet) -> Tensor:
        batch = images[torch.randint(len(images), (args.batch,), device=args.device)]
        if torch.rand(()) < 0.5:
            batch = batch.flip(-1)
        batch = (batch.float() / 255).to(memory_format=torch.channels_last)
        return dsm_loss(net, batch, sigma=draw_levels(len(batch), net.schedule).to(args.device), weighting=weighting)

    def report(averaged: ScoreNet, step: int) -> dict[str, float]:
        sampler = ODESampler(averaged, levels=3 if args.smoke else 18)
        drawn = sampler.sample(16, generator=torch.Generator().manual_seed(0), progress=False)
        save_grid(drawn, args.out / f"samples-{step:06d}.png")
        return {"images": step * args.batch, "test loss": round(held_out_loss(averaged, test), 3)}

    train(net, loss, report, args.out, steps=args.steps, every=args.every, lr=args.lr)


if __name__ == "__main__":
    main()
