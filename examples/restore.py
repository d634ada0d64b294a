"""Degrades pictures, restores them with a score network, trained for it or not, and shows all side by side.

    python examples/restore.py digit.png --out restored                              # all that fits, with "mnist"
    python examples/restore.py faces/ --out restored --model google/ddpm-celebahq-256 --tasks inpaint jpeg
    python examples/restore.py digit.png --out restored --restore guide-jacobian     # better, takes twice as long
    python examples/restore.py digit.png --out restored --tasks inpaint --mask free.png --sigma 0.1

Of each picture and task it writes the samples, a strip (what was seen, the samples, the original) and prints the root
mean square error to the original, of what was seen and of the samples. Pictures that are degraded already are restored
with ``python -m scorematch restore``.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.images import grid, list_pictures, read_image, read_mask, save_image
from scorematch.observe import JPEG, AveragePool, Grayscale, Mask, Observation, Operator, Uncrop
from scorematch.palette import condition_of

TASKS = ("inpaint", "uncrop", "colorize", "pool", "jpeg")


def operator(task: str, image: Tensor, mask: Tensor | None, quality: int) -> Operator | None:
    """What is done to an image (1, C, H, W), or None where that means nothing for it."""
    channels, height, width = image.shape[1:]
    if task == "inpaint":
        if mask is None:  # the middle half of each side is missing
            seen = torch.ones(height, width, dtype=torch.bool)
            seen[height // 4 : -(height // 4), width // 4 : -(width // 4)] = False
            return Mask(seen)
        return Mask(mask)
    if task == "uncrop":
        return Uncrop(right=width // 2)
    if task == "colorize":
        return Grayscale() if channels == 3 else None
    return AveragePool(4) if task == "pool" else JPEG(quality)


def as_picture(operator: Operator, y: Tensor, channels: int) -> Tensor:
    return y.expand(-1, channels, -1, -1) if isinstance(operator, Grayscale) else operator.lift(y)


def rmse(images: Tensor, original: Tensor) -> float:
    return float((images - original).square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", help="a picture, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the restored pictures and strips")
    parser.add_argument("--model", default="mnist", help="a short name, a folder or a repository of the Hub")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--mask", help="for inpaint, a picture of the same size, white where the image is seen")
    parser.add_argument("--quality", type=int, default=5, help="for jpeg, in 1..100")
    parser.add_argument("--sigma", type=float, default=0.0, help="noise to add to what is seen")
    parser.add_argument("--restore", default="replace", choices=["replace", "guide", "guide-jacobian"])
    parser.add_argument("--levels", type=int, help="noise levels, fewer for a quick look")
    parser.add_argument("-n", type=int, default=4, help="samples of each picture and task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    net = ScoreNet.from_pretrained(args.model).to(args.device)
    ladder = None if args.levels is None else net.schedule.respaced(args.levels)
    sampler = AnnealedLangevinSampler(net, ladder, restore=args.restore)
    palette = net.config.get("in_channels", 0) > net.sample_shape[0]  # it is shown what was seen
    mask = None if args.mask is None else read_mask(args.mask)
    generator = torch.Generator().manual_seed(0)
    for path in list_pictures(args.pictures):
        original = read_image(path, net.sample_shape[0])[None]
        for task in args.tasks:
            degradation = operator(task, original, mask, args.quality)
            if degradation is None:
                continue
            y = degradation.measure(original)
            y = y + args.sigma * torch.randn(y.shape, generator=generator)
            seen = as_picture(degradation, y, original.shape[1])
            observation = Observation(degradation, y, args.sigma)
            condition = condition_of(degradation, y.expand(args.n, -1, -1, -1), generator) if palette else None
            samples = sampler.sample(args.n, condition=condition, observation=observation, generator=generator).cpu()
            for k, sample in enumerate(samples, 1):
                save_image(sample, args.out / f"{path.stem}-{task}-{k}.png")
            strip = grid(torch.cat([seen, samples, original]), columns=args.n + 2)
            save_image(strip, args.out / f"{path.stem}-{task}-strip.png")
            print(
                f"{path.stem}, {task}: rmse {rmse(seen, original):.3f} of what was seen, {rmse(samples, original):.3f} "
                f"of the samples, {rmse(samples.mean(0), original[0]):.3f} of their mean"
            )


if __name__ == "__main__":
    main()
