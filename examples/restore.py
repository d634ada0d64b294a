"""Degrades pictures, restores them with a score network, and writes strips to compare.

    python examples/restore.py digit.png --out restored                              # all operators, with "mnist"
    python examples/restore.py faces/ --out restored --model google/ddpm-celebahq-256 --operators hole jpeg:5
    python examples/restore.py digit.png --out restored --restore replace            # faster, less accurate
    python examples/restore.py digit.png --out restored --operators mask:free.png --sigma 0.1

The network may be trained for restoration or not. For each picture and operator the program writes the samples and a
strip (the degraded picture, the samples, the original), and prints the root mean square error of both to the original.
To restore pictures that are already degraded, use ``python -m scorematch restore``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.data import grid, list_pictures, read_image, save_image
from scorematch.restoration import Observation, as_operator
from scorematch.restoration.methods import METHODS
from scorematch.restoration.palette import condition_of


def rmse(images: Tensor, original: Tensor) -> float:
    return float((images - original).square().mean().sqrt())


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="a picture, or a folder of pictures")
    parser.add_argument("--out", type=Path, required=True, help="folder for the restored pictures and strips")
    parser.add_argument("--model", default="mnist", help="a name, a folder or a repository of the Hub")
    parser.add_argument("--operators", nargs="+", help="such as pool:4 (default: hole half gray pool:4 jpeg:5)")
    parser.add_argument("--sigma", type=float, default=0.0, help="standard deviation of noise to add to y")
    parser.add_argument("--restore", default="auto", choices=METHODS)
    parser.add_argument("--levels", type=int, help="number of noise levels; fewer are faster")
    parser.add_argument("-n", type=int, default=4, help="samples per picture and operator")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    net = ScoreNet.from_pretrained(args.model).to(args.device)
    sampler = AnnealedLangevinSampler(net, levels=args.levels, restore=args.restore)
    # A network that was trained for restoration takes an image as its condition.
    conditional = net.conditioning is not None and net.conditioning.channels > 0
    colored = ["gray"] if net.sample_shape[0] == 3 else []
    operators = args.operators or ["hole", "half", *colored, "pool:4", "jpeg:5"]
    generator = torch.Generator().manual_seed(0)
    for path in list_pictures(args.pictures):
        original = read_image(path, net.sample_shape[0])[None]
        for text in operators:
            operator, name = as_operator(text).drawn(original, [0]), "".join(filter(str.isalnum, text))
            y = operator.measure(original)
            y = y + args.sigma * torch.randn(y.shape, generator=generator)
            degraded = operator.as_image(y)
            observation = Observation(operator, y, args.sigma)
            condition = condition_of(operator, y.expand(args.n, -1, -1, -1), generator) if conditional else None
            samples = sampler.sample(args.n, condition=condition, observation=observation, generator=generator).cpu()
            for k, sample in enumerate(samples, 1):
                save_image(sample, args.out / f"{path.stem}-{name}-{k}.png")
            strip = grid(torch.cat([degraded.clamp(0, 1), samples, original]), columns=args.n + 2)
            save_image(strip, args.out / f"{path.stem}-{name}-strip.png")
            print(
                f"{path.stem}, {text}: rmse {rmse(degraded, original):.3f} degraded, {rmse(samples, original):.3f} "
                f"restored, {rmse(samples.mean(0), original[0]):.3f} for the mean of the samples"
            )


if __name__ == "__main__":
    main()
