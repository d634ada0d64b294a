"""Trains a network on the 60,000 handwritten digits of MNIST; the network "mnist" of the package was made with it.

    python examples/train_mnist.py --data FOLDER --out runs/mnist                    # a small NCSNv2, as it ships
    python examples/train_mnist.py --data FOLDER --out runs/mnist                    # continues after a stop
    python examples/train_mnist.py --data FOLDER --out runs/more --start mnist       # starts from trained weights
    python examples/train_mnist.py --data FOLDER --out runs/unet --network unet      # a U-Net, row "karras"
    python examples/train_mnist.py --data FOLDER --out runs/ddpm --network ddpm      # a DDPM: noise, 1,000 time steps

The loss is to be compared with D/2 = 392, the loss of a network that returns zero. Every ``--every`` steps it writes
a checkpoint, a grid of samples from the averaged weights and a line of ``log.csv`` into the folder.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from mnist import load_digits
from torch import Tensor
from training import draw_levels, held_out_loss, train, weighting

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.images import save_grid
from scorematch.sampling import SamplerSettings

# Chosen on the trained network with tune_mnist.py. The step is 0.5 sigma_min^2.
SETTINGS = SamplerSettings(levels=100, step_size=5e-5, consistent=True)
CENTER = 0.5  # the noise level at which it is decided which digit a sample becomes


def build(network: str, images: Tensor, width: int) -> ScoreNet:
    """A network to train. Its noise levels follow from the images, except those of a DDPM."""
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
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="folder for checkpoints and pictures")
    parser.add_argument("--network", default="ncsnv2", choices=["ncsnv2", "unet", "ddpm"])
    parser.add_argument("--start", help="a trained network to start from, a name or a folder, instead of a new one")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; it falls to 0")
    parser.add_argument("--width", type=int, help="channels of the first features (default: 24; U-Net: 32)")
    parser.add_argument("--every", type=int, default=2000, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, as a test")
    parser.add_argument("--stop-at", type=int, help="stop at this step, as if interrupted")
    args = parser.parse_args(argv)
    if args.width is None:
        args.width = 24 if args.network == "ncsnv2" else 32
    if args.smoke:
        args.steps, args.batch, args.width, args.every = 4, 8, 4, 2

    torch.manual_seed(args.seed)
    digits = load_digits(args.data, "train")[0].to(args.device)  # 47 MB: all digits stay on the device
    test = load_digits(args.data, "test")[0][: 16 if args.smoke else 1000].to(args.device).float() / 255
    if args.start is None:
        net = build(args.network, digits[: 200 if args.smoke else None].float() / 255, args.width)
    else:
        net = ScoreNet.from_pretrained(args.start)
    net.to(args.device)
    print(f"{net.schedule}, {sum(p.numel() for p in net.parameters()):,} parameters, D/2 = {test[0].numel() / 2:g}")

    def loss(net: ScoreNet) -> Tensor:
        batch = digits[torch.randint(len(digits), (args.batch,), device=args.device)]
        batch = (batch.float() / 255).to(memory_format=torch.channels_last)
        if net.precondition == "ddpm":
            return dsm_loss(net, batch)  # as Ho et al.: uniform time steps, the squared error of the noise
        sigma = draw_levels(len(batch), net.schedule, batch.device, center=CENTER)
        return dsm_loss(net, batch, sigma=sigma, weighting=weighting)

    def report(averaged: ScoreNet, step: int) -> dict[str, float]:
        sampler = AnnealedLangevinSampler(averaged, levels=3 if args.smoke else None)
        save_grid(sampler.sample(16, generator=0, progress=False), args.out / f"samples-{step:06d}.png")
        return {"images": step * args.batch, "test loss": round(held_out_loss(averaged, test), 3)}

    train(net, loss, report, args.out, steps=args.steps, every=args.every, lr=args.lr, stop_at=args.stop_at)


if __name__ == "__main__":
    main()
