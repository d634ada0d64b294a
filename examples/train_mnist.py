"""Trains a network on 60,000 handwritten digits; the one that ships as "mnist" was made with it.

    python examples/train_mnist.py --data FOLDER --out runs/mnist                    # a small NCSNv2, as it ships
    python examples/train_mnist.py --data FOLDER --out runs/mnist                    # goes on where it stopped
    python examples/train_mnist.py --data FOLDER --out runs/more --start mnist       # goes on from trained weights
    python examples/train_mnist.py --data FOLDER --out runs/unet --network unet      # a U-Net, row "karras"
    python examples/train_mnist.py --data FOLDER --out runs/ddpm --network ddpm      # a DDPM: noise, 1,000 time steps

The loss stands beside D/2 = 392, which is what a network that knows nothing scores. Every ``--every`` steps it writes a
checkpoint, a grid of samples from the averaged weights and a line of ``log.csv`` into the folder.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from mnist import load_digits
from torch import Tensor
from training import train

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.images import save_grid

# Chosen on the trained network with tune_mnist.py. The step is 0.5 sigma_min^2.
SETTINGS = {"levels": 100, "step_size": 5e-5, "consistent": True}


def build(network: str, images: Tensor, width: int) -> ScoreNet:
    """A network to train; its ladder follows from the images, but for a DDPM."""
    if network == "ddpm":
        schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
        return ScoreNet.unet(1, 28, widths=(width, 2 * width, 2 * width), schedule=schedule, precondition="ddpm")
    schedule = NoiseSchedule.from_data(images, max_images=len(images))
    if network == "unet":
        return ScoreNet.unet(1, 28, widths=(width, 2 * width, 2 * width), schedule=schedule)
    net = ScoreNet.ncsnv2(1, 28, width=width, depth="deeper", schedule=schedule, precondition="karras")
    net.sampler_settings = SETTINGS
    return net


def draw_levels(n: int, schedule: NoiseSchedule) -> Tensor:
    """Half at all levels alike, half about 0.5, where samples settle which digit they are."""
    anywhere = schedule.sigmas[torch.randint(len(schedule), (n,))]
    about = (0.5 * torch.randn(n).exp()).clamp(schedule.sigmas[-1], schedule.sigmas[0])
    return torch.where(torch.arange(n) % 2 == 0, anywhere, about)


def weighting(sigma: Tensor) -> Tensor:
    """Equal weight to the backbone's own error at every level: 1 / c_out^2 of the row "karras"."""
    return sigma**2 * (1 + (sigma / 0.25) ** 2)


@torch.no_grad()
def held_out_loss(net: ScoreNet, x: Tensor) -> float:
    """The loss on test digits, in its default weighting, with the same noise every time."""
    batches = x.split(250)
    generator = torch.Generator().manual_seed(0)
    with torch.autocast(x.device.type, torch.bfloat16):
        return sum(float(dsm_loss(net, batch, generator=generator)) for batch in batches) / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"), help="folder for checkpoints and pictures")
    parser.add_argument("--network", default="ncsnv2", choices=["ncsnv2", "unet", "ddpm"])
    parser.add_argument("--start", help="a trained network to go on from, a name or a folder, instead of a new one")
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; 0 at the last step")
    parser.add_argument("--width", type=int, help="of the first features (24, of a U-Net 32)")
    parser.add_argument("--every", type=int, default=2000, help="steps between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, to see that all runs")
    parser.add_argument("--stop-at", type=int, help="end early, at this step, as if interrupted")
    args = parser.parse_args()
    if args.width is None:
        args.width = 24 if args.network == "ncsnv2" else 32
    if args.smoke:
        args.steps, args.batch, args.width, args.every = 4, 8, 4, 2

    torch.manual_seed(args.seed)
    digits = load_digits(args.data, "train")[0].to(args.device)  # 47 MB: the whole set stays on the device
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
            return dsm_loss(net, batch)  # Ho et al.: all time steps alike, the error of the noise
        sigma = draw_levels(len(batch), net.schedule).to(args.device)
        return dsm_loss(net, batch, sigma=sigma, weighting=weighting)

    def report(averaged: ScoreNet, step: int) -> dict[str, float]:
        sampler = AnnealedLangevinSampler(averaged, averaged.schedule.respaced(3) if args.smoke else None)
        images = sampler.sample(16, generator=torch.Generator().manual_seed(0), progress=False)
        save_grid(images, args.out / f"samples-{step:06d}.png")
        return {"images": step * args.batch, "test loss": round(held_out_loss(averaged, test), 3)}

    train(net, loss, report, args.out, steps=args.steps, every=args.every, lr=args.lr, stop_at=args.stop_at)


if __name__ == "__main__":
    main()
