"""Compares sampler settings on a small network of CIFAR-10, to choose those recommended for networks of the Hub.

    python examples/train_cifar10.py --data FOLDER --out runs/cifar10
    python examples/tune_cifar10.py --data FOLDER --model runs/cifar10/network
    python examples/tune_cifar10.py --data FOLDER --model gaussian

The settings are those of ``tune_mnist.py``. A small network draws no objects that a classifier could recognize, but its
samples have the colors and textures of the images. Few steps impair these: with too much noise the samples have grain
and too much contrast, and with too little noise they have too little contrast. The figures of each line are therefore
those of pixels:

- patches: 1,000 times the Fréchet distance of the patches of 4x4 pixels to those of 5,000 training images;
- std: the standard deviation of all pixels;
- saturation: the mean difference of the largest and the smallest channel;
- variation: the mean absolute difference of neighboring pixels.

The first line is Heun's method on the probability flow, a reference for what the network can do; the last line has the
figures of test images.

"gaussian" is not a network, but the exact score of the normal distribution with the mean and the covariance of the
training images. It shows the error of the settings alone; its last line has exact samples.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from cifar10 import load_images
from einops import rearrange
from torch import Tensor
from tune_mnist import samplers

from scorematch import NoiseSchedule, ScoreNet
from scorematch.data import save_grid
from scorematch.evaluation import Evaluator, image_figures
from scorematch.evaluation.exact import Empirical, Gaussian
from scorematch.sampling import ODESampler, Sampler


def patches(images: Tensor) -> Tensor:
    """All non-overlapping patches of 4x4 pixels, (N, 3, H, W) -> (N H W / 16, 3, 4, 4)."""
    return rearrange(images, "n c (h a) (w b) -> (n h w) c a b", a=4, b=4)


def row(images: Tensor, evaluator: Evaluator) -> str:
    """The figures of images, whose patches are compared with those of training images."""
    frechet = 1000 * evaluator.measure([patches(images)])["pixels"]["frechet"].value
    found = {name: figure.value for name, figure in image_figures([images]).items()}
    return f"{frechet:>7.1f} {found['std']:.3f} {found['saturation']:>10.3f} {found['variation']:>9.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--model", default="runs/cifar10/network", help='a name or a folder, or "gaussian"')
    parser.add_argument("--n", type=int, default=100, help="samples per setting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the first 64 samples of each setting")
    parser.add_argument("--only", type=int, nargs="+", help="run only these lines; 0 is Heun's method")
    parser.add_argument("--smoke", action="store_true", help="images of 8x8 pixels for the Gaussian, as a test")
    args = parser.parse_args(argv)

    train, test = (load_images(args.data, split)[0] for split in ("train", "test"))
    if args.smoke and args.model == "gaussian":
        train, test = (F.avg_pool2d(images.float(), 4).to(torch.uint8) for images in (train, test))
    evaluator = Evaluator(
        patches(train[:5000]), features="pixels", metrics=["frechet"], batch_size=10_000, cache=False, progress=False
    )
    if args.model == "gaussian":
        schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
        # Samplers start around the middle of the range and clamp to it, as for a network.
        net = Gaussian.like(Empirical(train, schedule=schedule, value_range=(0.0, 1.0)))
    else:
        net = ScoreNet.from_pretrained(args.model)
    flow = ODESampler(net, levels=18)
    lines: list[tuple[str, Sampler]] = [(f"{18:>6} {'Heun':>22} {len(flow):>5}", flow), *samplers(net)]
    print("line levels steps     a      noise calls | patches   std saturation variation", flush=True)
    for line, (setting, sampler) in enumerate(lines):
        if args.only is not None and line not in args.only:
            continue
        images = sampler.sample(args.n, generator=args.seed, progress=False)
        if args.out is not None:
            save_grid(images[:64], args.out / f"settings-{line:02d}.png")
        print(f"{line:>4} {setting} | {row(images, evaluator)}", flush=True)
    if args.model == "gaussian":
        print(f"{'exact samples':>40} | {row(net.sample(args.n, args.seed).clamp(0, 1), evaluator)}")
    else:
        generator = torch.Generator().manual_seed(args.seed)
        chosen = test[torch.randperm(len(test), generator=generator)[: args.n]]
        print(f"{'test images':>40} | {row(chosen, evaluator)}")


if __name__ == "__main__":
    main()
