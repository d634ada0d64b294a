"""Palette: one network that restores images in four ways, trained on clean images and degraded copies of them.

    python examples/palette.py --data FOLDER --out runs/palette                        # MNIST in three colors, 4 tasks
    python examples/palette.py --data FOLDER --out runs/palette                        # continues an interrupted run
    python examples/palette.py --data FOLDER --out runs/l1 --p 1                       # the ablation of the paper
    python examples/palette.py --data FOLDER --out runs/one --tasks hole               # one task only
    python examples/palette.py --data FOLDER --out runs/regression --regression        # a baseline without sampling
    python examples/palette.py --data FOLDER --out runs/palette --evaluate             # the figures only
    python examples/palette.py --data FOLDER --out runs/cifar --images cifar10 --width 96

The digits have one of three colors with the same luma, drawn with the probabilities 0.5, 0.3 and 0.2. A gray digit
contains no information about its color, so the correct distribution of the result of colorization is known: these three
colors with these probabilities. ``scorematch.training.train`` writes the network and a log into the folder, and every
``--every`` steps pictures of training images: the condition, a sample and the original. At the end there is
``strip.png`` of test images, for each task the condition, three samples and the original.

The program prints these figures of test images. Figures of the degraded images have "input" before their names; for
them a hole is black:

    rmse         the root mean square error to the original
    accuracy     the share of digits that a classifier classifies correctly, in gray (Palette's CA)
    diversity    the root mean square difference of two samples of the same input
    consistency  the root mean square difference of the measurements of the sample and of the original
    color 1-3    the share of samples whose color is nearest to the first, second and third color
"""

import argparse
import csv
import math
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import torch
from cifar10 import load_images
from digit_classifier import Classifier, classify, load_classifier
from mnist import load_digits
from torch import Tensor

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.data import save_grid, to_uint8
from scorematch.restoration import JPEG, Grayscale, Mask, Observation
from scorematch.restoration.palette import TASKS, JPEGRestoration, MultiTask
from scorematch.sampling import AncestralSampler, SamplerSettings
from scorematch.sampling.ancestral import Variance
from scorematch.training import LevelMixture, LogNormal, train
from scorematch.training.levels import weighting_for

LUMA = 0.4  # of each color, by the weights of BT.601
COLORS = torch.tensor([[1, (LUMA - 0.299) / 0.587, 0], [0, LUMA / 0.587, 0], [0, (LUMA - 0.114) / 0.587, 1]])
SHARES = torch.tensor([0.5, 0.3, 0.2])
TEST_QUALITY = 5  # of JPEG in the figures, the lowest of training


def colored(digits: Tensor, seed: int) -> Tensor:
    """Gray digits (N, 1, 28, 28), uint8, each in one of the three colors, (N, 3, 28, 28) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(SHARES, len(digits), replacement=True, generator=generator)
    return digits.float() / 255 * COLORS[which, :, None, None]


def regression_loss(net: ScoreNet, x: Tensor, *, sigma: Tensor, noise: Tensor, **given: Any) -> Tensor:
    """The loss with noise that makes every noisy image gray, so that the condition alone decides the result."""
    return dsm_loss(net, x, sigma=sigma, noise=(0.5 - x) / sigma[:, None, None, None], reduction="none", **given)


def restore(sampler: AncestralSampler, x: Tensor, name: str, draws: int) -> tuple[Tensor, Tensor, list[float]]:
    """Degrades images and restores them.

    Returns:
        The degraded images (N, ...), the samples (draws, N, ...), and the consistency of both.
    """
    task = JPEGRestoration(TEST_QUALITY, TEST_QUALITY) if name == "jpeg" else TASKS[name]()
    condition, mask = task(x)
    operator = {"gray": Grayscale(), "jpeg": JPEG(TEST_QUALITY)}.get(name, Mask(~mask))
    y = operator.measure(x)
    observation = Observation(operator, y) if isinstance(operator, Mask) else None  # only the hole is sampled
    # A regression has one level, at which its noisy image is gray.
    init = torch.full_like(x, 0.5) if len(sampler.schedule) == 1 else None
    samples = [
        sampler.sample(init=init, condition=condition, observation=observation, batch_size=64, progress=False)
        for _ in range(draws)
    ]
    degraded = condition if observation is None else y
    consistency = [rmse(operator.measure(images), y) for images in [degraded, samples[0]]]
    return degraded, torch.stack(samples), consistency


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of colored digits that are classified correctly."""
    gray = (Grayscale().measure(images.cpu()) / LUMA).clamp(0, 1)
    return float((classify(classifier, to_uint8(gray)) == labels).float().mean())


def rmse(a: Tensor, b: Tensor) -> float:
    """The root mean square difference."""
    return float((a - b).square().mean().sqrt())


def color_shares(images: Tensor) -> list[float]:
    """The shares of the images whose color is nearest to each of the three."""
    color = LUMA * images.sum((2, 3)) / Grayscale().measure(images).sum((2, 3)).clamp(min=1e-6)
    nearest = torch.cdist(color, COLORS.to(images.device)).argmin(1)
    return (torch.bincount(nearest, minlength=3) / len(images)).tolist()


def figures(
    sampler: AncestralSampler, x: Tensor, name: str, draws: int, classifier: Classifier | None, labels: Tensor
) -> dict[str, str | float]:
    """The figures of one task; those of the degraded images have "input" before their names."""
    degraded, samples, consistency = restore(sampler, x, name, draws)
    row: dict[str, str | float] = {"task": name, "input rmse": rmse(degraded, x)}
    row["rmse"] = sum(rmse(images, x) for images in samples) / draws
    if classifier is not None:
        row["original accuracy"] = accuracy(classifier, x, labels)
        row["input accuracy"] = accuracy(classifier, degraded, labels)
        row["accuracy"] = sum(accuracy(classifier, images, labels) for images in samples) / draws
    pairs = list(combinations(samples, 2))
    row["diversity"] = sum(rmse(a, b) for a, b in pairs) / max(1, len(pairs))
    row["input consistency"], row["consistency"] = consistency
    if classifier is not None:
        for prefix, images in [("original ", x), ("", samples.flatten(0, 1))]:
            for i, share in enumerate(color_shares(images), 1):
                row[f"{prefix}color {i}"] = share
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def strip(sampler: AncestralSampler, x: Tensor, names: list[str]) -> Tensor:
    """For each task and image five pictures: the degraded image, three samples, the original."""
    rows = []
    for name in names:
        degraded, samples, _ = restore(sampler, x, name, 3)
        rows.append(torch.stack([degraded, *samples, x], 1).flatten(0, 1))
    return torch.cat(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST or CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--images", default="mnist", choices=["mnist", "cifar10"])
    parser.add_argument("--out", type=Path, default=Path("runs/palette"), help="folder of the run")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--p", type=float, default=2, help="power of the loss, 1 or 2")
    parser.add_argument("--regression", action="store_true", help="predict the image, without sampling")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; it falls to 0")
    parser.add_argument("--width", type=int, default=32, help="channels of the first features")
    parser.add_argument("--every", type=int, default=1000, help="steps between pictures")
    parser.add_argument("--evaluate", action="store_true", help="do not train; evaluate the network in --out")
    parser.add_argument("--n", type=int, default=500, help="test images for the figures")
    parser.add_argument("--draws", type=int, default=2, help="samples per test image")
    parser.add_argument("--levels", type=int, default=50, help="noise levels of the sampler, as many as network calls")
    parser.add_argument("--variance", default="small", choices=get_args(Variance), help="of the ancestral step")
    parser.add_argument(
        "--classifier", type=Path, default=Path("runs/digit_classifier.pt"), help="file of the classifier of digits"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.batch, args.width, args.every, args.n, args.levels = 4, 8, 4, 2, 8, 3

    device = "cuda" if torch.cuda.is_available() else "cpu"
    load = load_digits if args.images == "mnist" else load_images
    test, labels = (part[: args.n] for part in load(args.data, "test"))
    test = (colored(test, seed=1) if args.images == "mnist" else test.float() / 255).to(device)

    def sampler(net: ScoreNet) -> AncestralSampler:
        return AncestralSampler(net, levels=min(args.levels, len(net.schedule)), variance=args.variance)

    if not args.evaluate:
        images = load(args.data, "train")[0]
        images = colored(images, seed=0) if args.images == "mnist" else images
        few = images[: 200 if args.smoke else 2000]
        schedule = NoiseSchedule.from_data(few / 255 if few.dtype == torch.uint8 else few)
        torch.manual_seed(args.seed)
        net = ScoreNet.unet(
            3,
            tuple(test.shape[2:]),
            widths=(args.width, 2 * args.width, 2 * args.width),
            layers_per_block=1,
            condition_channels=3,
            schedule=NoiseSchedule([schedule.sigma_max]) if args.regression else schedule,
        )
        net.sampler_settings = SamplerSettings(
            sampler="ancestral", levels=None if args.regression else args.levels, variance=args.variance
        )
        print(f"{net.schedule}, {sum(p.numel() for p in net.parameters()):,} parameters")
        if args.regression:
            weighting = weighting_for(net, "backbone", args.p)
            kind = {"loss": partial(regression_loss, p=args.p, weighting=weighting), "levels": net.schedule}
        else:
            kind = {"p": args.p, "levels": LevelMixture((schedule, LogNormal(math.log(0.5), 1)))}
        train(
            net,
            images,
            args.out,
            images=args.steps * args.batch,
            batch_size=args.batch,
            lr=args.lr,
            condition=MultiTask([TASKS[name]() for name in args.tasks]),
            augment=None if args.images == "cifar10" else (),
            seed=args.seed,
            sample_every=args.every * args.batch,
            **kind,
        )

    net = ScoreNet.from_pretrained(args.out / "network").to(device)
    classifier = load_classifier(args.classifier, args.data) if args.images == "mnist" else None
    torch.manual_seed(3)
    save_grid(strip(sampler(net), test[:4], args.tasks), args.out / "strip.png", columns=10)
    rows = [figures(sampler(net), test, name, args.draws, classifier, labels) for name in args.tasks]
    with (args.out / "figures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"{'':>20}" + "".join(f"{row['task']:>14}" for row in rows))
    for name in list(rows[0])[1:]:
        print(f"{name:>20}" + "".join(f"{row[name]:>14.4f}" for row in rows))


if __name__ == "__main__":
    main()
