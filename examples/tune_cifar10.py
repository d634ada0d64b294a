"""Measures sampler settings on a small network of CIFAR-10, to choose those that come with the Hub's networks.

    python examples/train_cifar10.py --data FOLDER --out runs/cifar10
    python examples/tune_cifar10.py --data FOLDER --model runs/cifar10/network
    python examples/tune_cifar10.py --data FOLDER --model gaussian

The settings are those of ``tune_mnist.py``. What a small network draws is no object that a classifier could name, but
it has the colors and textures of one, and those are what few steps spoil: a chain that is too loud is grainy and
over-contrasted, one that is too quiet washes out. So the figures of each line are those of pixels: the Fréchet distance
of patches of 4x4 pixels to those of 5,000 training images, times 1,000; the deviation of all pixels; the saturation,
which is the largest less the smallest channel; and the mean step to a neighbor. First stands Heun's method on the
network's probability flow, which says what the network itself can do, and last stand the test images.

"gaussian" is no network but the exact score of the normal distribution with the mean and the covariance of the training
images: what a setting makes of that is the setting's own doing, and last stand exact draws.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import load_images
from evaluate_mnist import frechet_distance
from torch import Tensor
from tune_mnist import samplers

from scorematch import NoiseSchedule, ScoreNet
from scorematch.images import save_grid
from scorematch.sampling import ODESampler, Sampler


def patches(images: Tensor) -> Tensor:
    """All patches of 4x4 pixels that do not overlap, (N, 3, H, W) -> (N H W / 16, 48)."""
    return F.unfold(images, 4, stride=4).transpose(1, 2).flatten(0, 1)


class Gaussian:
    """The exact score of the normal distribution with the mean and the covariance of images (N, 3, 32, 32)."""

    value_range = (0.0, 1.0)  # so that chains begin about its middle, and are clamped like a network's
    sample_shape = (3, 32, 32)
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))

    def __init__(self, images: Tensor) -> None:
        flat = images.flatten(1)
        self.mean = flat.mean(0)
        values, self.vectors = torch.linalg.eigh(torch.cov(flat.T))
        self.values = values.clamp(min=0)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        along = (x.flatten(1) - self.mean) @ self.vectors
        return -(along / (self.values + sigma**2) @ self.vectors.T).view_as(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact draws (n, 3, 32, 32), clamped."""
        z = torch.randn(n, len(self.mean), generator=generator)
        return (self.mean + z * self.values.sqrt() @ self.vectors.T).view(n, *self.sample_shape).clamp(0, 1)


def row(images: Tensor, reference: Tensor) -> str:
    """The figures of images in [0, 1], against the patches of training images."""
    saturation = (images.amax(1) - images.amin(1)).mean()
    variation = (images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2
    frechet = 1000 * frechet_distance(patches(images), reference)
    return f"{frechet:>7.1f} {images.std():.3f} {saturation:>10.3f} {variation:>9.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--model", default="runs/cifar10/network", help='a name or a folder, or "gaussian"')
    parser.add_argument("--n", type=int, default=100, help="samples of each setting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the first 64 samples of each setting")
    parser.add_argument("--only", type=int, nargs="+", help="which settings, by their line; 0 is Heun's method")
    args = parser.parse_args()

    train, test = (load_images(args.data, split)[0] for split in ("train", "test"))
    reference = patches(train[:5000].float() / 255)
    net = Gaussian(train.float() / 255) if args.model == "gaussian" else ScoreNet.from_pretrained(args.model)
    flow = ODESampler(net, levels=18)
    lines: list[tuple[str, Sampler]] = [(f"{18:>6} {'Heun':>22} {len(flow):>5}", flow), *samplers(net)]
    print("line levels steps     a      noise calls | patches   std saturation variation", flush=True)
    for line, (setting, sampler) in enumerate(lines):
        if args.only is not None and line not in args.only:
            continue
        images = sampler.sample(args.n, generator=torch.Generator().manual_seed(args.seed), progress=False)
        if args.out is not None:
            save_grid(images[:64], args.out / f"settings-{line:02d}.png")
        print(f"{line:>4} {setting} | {row(images, reference)}", flush=True)
    generator = torch.Generator().manual_seed(args.seed)
    if isinstance(net, Gaussian):
        print(f"{'exact draws':>40} | {row(net.sample(args.n, generator), reference)}")
    else:
        chosen = test[torch.randperm(len(test), generator=generator)[: args.n]]
        print(f"{'test images':>40} | {row(chosen.float() / 255, reference)}")


if __name__ == "__main__":
    main()
