"""Palette: one network that restores images in four ways, trained on pairs that it makes of clean images.

    python examples/palette.py --data FOLDER --out runs/palette                        # MNIST in three colors, 4 tasks
    python examples/palette.py --data FOLDER --out runs/palette                        # goes on where it stopped
    python examples/palette.py --data FOLDER --out runs/l1 --p 1                       # the paper's ablation
    python examples/palette.py --data FOLDER --out runs/one --tasks inpainting         # one task only
    python examples/palette.py --data FOLDER --out runs/regression --regression        # the condition alone: a baseline
    python examples/palette.py --data FOLDER --out runs/palette --evaluate             # the figures only
    python examples/palette.py --data FOLDER --out runs/cifar --images cifar10 --width 96

The digits are tinted with one of three colors of the same luma, drawn with probabilities .5, .3 and .2: nothing gray
says which, so that the right answer of colorization is known, these three in these shares. Every ``--every`` steps a
strip of pictures goes into the folder: what the network is shown, three samples, and the original, for each task.

The figures, of test images, each beside that of the degraded input (a hole is black there):

    rmse         to the original
    right        the share of digits that a classifier reads right, in gray (Palette's CA)
    diversity    the root mean square difference between two samples of the same input
    consistency  the root mean square difference of what is observed of the sample to what was of the original
    colors       the shares of samples whose color is nearest to the first, the second, the third tint
"""

import argparse
import csv
from itertools import combinations
from pathlib import Path
from typing import get_args

import torch
from cifar10 import load_images
from evaluate_mnist import Classifier, load_classifier, read
from mnist import load_digits
from torch import Tensor
from train_mnist import draw_levels
from training import train

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.images import save_grid
from scorematch.observe import JPEG, Grayscale, Mask, Observation
from scorematch.palette import Colorization, Inpainting, JPEGRestoration, MultiTask, Uncropping
from scorematch.sampling import AncestralSampler
from scorematch.sampling.ancestral import Noise

LUMA = 0.4  # of each tint, as BT.601 counts it
TINTS = torch.tensor([[1, (LUMA - 0.299) / 0.587, 0], [0, LUMA / 0.587, 0], [0, (LUMA - 0.114) / 0.587, 1]])
SHARES = torch.tensor([0.5, 0.3, 0.2])
TASKS = {
    "colorization": Colorization(),
    "inpainting": Inpainting(),
    "uncropping": Uncropping(),
    "jpeg": JPEGRestoration(),
}
TEST_QUALITY = 5  # of JPEG in the figures, the hardest of those that are trained


def tinted(digits: Tensor) -> Tensor:
    """Gray digits (N, 1, 28, 28), uint8, each in one of the three colors, in [0, 1]."""
    which = torch.multinomial(SHARES, len(digits), replacement=True)
    return digits.float() / 255 * TINTS[which, :, None, None].to(digits.device)


def prepare(images: Tensor) -> Tensor:
    """Stored images as the network knows them, (N, 3, H, W) in [0, 1]."""
    return tinted(images) if images.shape[1] == 1 else images.float() / 255


def loss(net: ScoreNet, x: Tensor, task: MultiTask, p: float, regression: bool) -> Tensor:
    """Palette's loss on a batch of clean images."""
    condition, region = task(x)
    condition = condition.to(memory_format=torch.channels_last)

    def weighting(sigma: Tensor) -> Tensor:
        """Equal weight to the backbone's own error at every level: 1 / c_out^p of the row "karras"."""
        return (sigma * (1 + (sigma / 0.25) ** 2) ** 0.5) ** p

    # Noise that makes every noisy image gray is a regression: the denoised image follows from the condition alone.
    levels = net.schedule.sigma_max if regression else draw_levels(len(x), net.schedule).to(x)
    noise = (0.5 - x) / net.schedule.sigma_max if regression else None
    return dsm_loss(net, x, sigma=levels, noise=noise, condition=condition, region=region, p=p, weighting=weighting)


def restore(sampler: AncestralSampler, x: Tensor, name: str, draws: int) -> tuple[Tensor, Tensor, list[float]]:
    """Degrades images and restores them: the degraded ones (N, ...), the samples (draws, N, ...), and how consistent.

    Consistency is that of the degraded images, then that of the samples.
    """
    task = JPEGRestoration(TEST_QUALITY, TEST_QUALITY) if name == "jpeg" else TASKS[name]
    condition, region = task(x)
    operator = {"colorization": Grayscale(), "jpeg": JPEG(TEST_QUALITY)}.get(name, Mask(~region))
    y = operator.measure(x)
    seen = Observation(operator, y) if isinstance(operator, Mask) else None  # the prediction only in the hole
    # A network that regresses has one level, and is shown gray at it.
    init = torch.full_like(x, 0.5) if len(sampler.schedule) == 1 else None
    with torch.autocast(x.device.type, torch.bfloat16):  # much faster, the same statistics
        samples = [
            sampler.sample(init=init, condition=condition, observation=seen, batch_size=64, progress=False)
            for _ in range(draws)
        ]
    degraded = y if seen is not None else condition
    consistency = [rmse(operator.measure(images), y) for images in [degraded, samples[0]]]
    return degraded, torch.stack(samples), consistency


def rmse(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def right(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of tinted digits that are read right."""
    digits = (Grayscale().measure(images.cpu()) / LUMA).clamp(0, 1)
    return float((read(classifier, digits)[0].argmax(1) == labels).float().mean())


def color_shares(images: Tensor) -> list[float]:
    """How many of the images are nearest to each tint, as shares."""
    color = LUMA * images.sum((2, 3)) / Grayscale().measure(images).sum((2, 3)).clamp(min=1e-6)
    nearest = torch.cdist(color, TINTS.to(images.device)).argmin(1)
    return (torch.bincount(nearest, minlength=3) / len(images)).tolist()


def figures(
    sampler: AncestralSampler, x: Tensor, name: str, draws: int, classifier: Classifier | None, labels: Tensor
) -> dict[str, str | float]:
    """The figures of one task; those of the degraded input have "input" before their names."""
    degraded, samples, consistency = restore(sampler, x, name, draws)
    row: dict[str, str | float] = {"task": name, "input rmse": rmse(degraded, x)}
    row["rmse"] = sum(rmse(images, x) for images in samples) / draws
    if classifier is not None:
        row["original right"] = right(classifier, x, labels)
        row["input right"] = right(classifier, degraded, labels)
        row["right"] = sum(right(classifier, images, labels) for images in samples) / draws
    pairs = list(combinations(samples, 2))
    row["diversity"] = sum(rmse(a, b) for a, b in pairs) / max(1, len(pairs))
    row["input consistency"], row["consistency"] = consistency
    if classifier is not None:
        for said, images in [("original", x), ("", samples.flatten(0, 1))]:
            for i, share in enumerate(color_shares(images), 1):
                row[f"{said} color {i}".strip()] = share
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def strip(sampler: AncestralSampler, x: Tensor, names: list[str]) -> Tensor:
    """For each task and image a row of five pictures: the input, three samples, the original."""
    rows = []
    for name in names:
        degraded, samples, _ = restore(sampler, x, name, 3)
        rows.append(torch.stack([degraded, *samples, x], 1).flatten(0, 1))
    return torch.cat(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST or CIFAR-10; torchvision downloads it otherwise")
    parser.add_argument("--images", default="mnist", choices=["mnist", "cifar10"])
    parser.add_argument("--out", type=Path, default=Path("runs/palette"), help="folder for checkpoints and pictures")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--p", type=float, default=2, help="the power of the loss, 1 or 2")
    parser.add_argument("--regression", action="store_true", help="predict the image from the condition alone")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; 0 at the last step")
    parser.add_argument("--width", type=int, default=32, help="of the first features")
    parser.add_argument("--every", type=int, default=1000, help="steps between checkpoints")
    parser.add_argument("--evaluate", action="store_true", help="only the figures, of the network in --out")
    parser.add_argument("--n", type=int, default=500, help="test images for the figures")
    parser.add_argument("--draws", type=int, default=2, help="samples of each test image")
    parser.add_argument("--levels", type=int, default=50, help="network calls that a sample takes")
    parser.add_argument("--variance", default="small", choices=get_args(Noise), help="of the ancestral step")
    parser.add_argument("--classifier", type=Path, default=Path("runs/digit_classifier.pt"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="four steps of a tiny network, to see that all runs")
    parser.add_argument("--stop-at", type=int, help="end early, at this step, as if interrupted")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch, args.width, args.every, args.n, args.levels = 4, 8, 4, 2, 8, 3

    torch.manual_seed(args.seed)
    load = load_digits if args.images == "mnist" else load_images
    images = load(args.data, "train")[0].to(args.device)  # 47 or 154 MB: the whole set stays on the device
    test, labels = (part[: args.n] for part in load(args.data, "test"))
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the ladder first, so that no option changes it
        schedule = NoiseSchedule.from_data(prepare(images[: 200 if args.smoke else 2000]))
        test = prepare(test.to(args.device))
    task = MultiTask([TASKS[name] for name in args.tasks])
    print(f"{task}, {schedule}")

    def batch_loss(net: ScoreNet) -> Tensor:
        batch = prepare(images[torch.randint(len(images), (args.batch,), device=args.device)])
        return loss(net, batch.to(memory_format=torch.channels_last), task, args.p, args.regression)

    def sampler(net: ScoreNet) -> AncestralSampler:
        return AncestralSampler(net, levels=min(args.levels, len(net.schedule)), variance=args.variance)

    def report(averaged: ScoreNet, step: int) -> dict[str, float]:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2)
            save_grid(strip(sampler(averaged), test[:4], args.tasks), args.out / f"strip-{step:06d}.png", columns=10)
            with torch.autocast(test.device.type, torch.bfloat16):
                parts = [float(loss(averaged, part, task, args.p, args.regression)) for part in test.split(64)]
        return {"test loss": round(sum(parts) / len(parts), 3)}

    if not args.evaluate:
        net = ScoreNet.unet(
            3,
            tuple(test.shape[2:]),
            widths=(args.width, 2 * args.width, 2 * args.width),
            layers_per_block=1,
            condition_channels=3,
            schedule=NoiseSchedule([schedule.sigma_max]) if args.regression else schedule,
        ).to(args.device)
        print(f"{sum(p.numel() for p in net.parameters()):,} parameters")
        train(net, batch_loss, report, args.out, steps=args.steps, every=args.every, lr=args.lr, stop_at=args.stop_at)
        if args.stop_at is not None:
            return

    net = ScoreNet.from_pretrained((args.out / "network").resolve()).to(args.device, memory_format=torch.channels_last)
    classifier = load_classifier(args.classifier, args.data) if args.images == "mnist" else None
    torch.manual_seed(3)
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
