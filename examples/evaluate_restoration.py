"""Evaluates restoration: degraded test digits, restored with a network that was not trained for it.

    python examples/evaluate_restoration.py --data FOLDER                            # 500 digits, "mnist"
    python examples/evaluate_restoration.py --data FOLDER --restore guide --n 100 --tasks "pool 4"

Each digit is restored ``--draws`` times. The figures, printed for the degraded digits ("input") and for each method:

- rmse: the root mean square error to the original, and in brackets that of the mean of the draws;
- accuracy: the share that the classifier of evaluate_mnist.py classifies correctly;
- diversity: the root mean square difference of two draws;
- residual: the root mean square of y - A x, the measurement less the same measurement of the result. It should be 0, or
  the standard deviation of the noise in y.
"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from evaluate_mnist import accuracy, add_options, load_classifier, rmse
from mnist import load_digits
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.images import grid, save_image
from scorematch.observe import JPEG, AveragePool, Mask, Observation, Operator, Uncrop

STROKE = 3.5  # half the width of the line of the free-form mask, in pixels of 28


def free_mask(height: int, width: int) -> Tensor:
    """A mask (H, W), True outside a thick wave from the upper left to the lower right."""
    y, x = torch.meshgrid(torch.linspace(0, 28, height), torch.linspace(0, 28, width), indexing="ij")
    t = torch.linspace(0, 1, 200)
    line_x, line_y = 3 + 22 * t, 14 + 9 * torch.sin(2 * math.pi * t)
    return ((x[..., None] - line_x) ** 2 + (y[..., None] - line_y) ** 2).amin(-1) > STROKE**2


TASKS: dict[str, tuple[Operator, float]] = {  # an operator, and the noise in its measurement
    "free mask": (Mask(free_mask(28, 28)), 0.0),
    "right half": (Uncrop(right=14), 0.0),
    "right half, noise 0.2": (Uncrop(right=14), 0.2),
    "pool 4": (AveragePool(4), 0.0),
    "pool 4, noise 0.05": (AveragePool(4), 0.05),
    "jpeg 5": (JPEG(5), 0.0),
    "jpeg 1": (JPEG(1), 0.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--n", type=int, default=500, help="number of test digits")
    parser.add_argument("--draws", type=int, default=2, help="restorations of each digit")
    parser.add_argument("--restore", nargs="+", default=["replace"], choices=["replace", "guide", "guide-jacobian"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--levels", type=int, help="number of noise levels (default: the network's settings)")
    parser.add_argument("--steps", type=int, help="Langevin steps per level, instead of consistent sampling")
    parser.add_argument("--out", type=Path, help="folder for a picture of the first digits of each task")
    args = parser.parse_args(argv)

    classifier = load_classifier(args.classifier, args.data)
    test, labels = load_digits(args.data, "test")
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: args.n]
    x, labels = test[chosen].float() / 255, labels[chosen]
    net = ScoreNet.from_pretrained(args.model)
    print(f"{args.n} test digits, of which {accuracy(classifier, x, labels):.1%} are classified correctly")
    print(f"{'':>38}{'rmse':>16}{'accuracy':>9}{'diversity':>11}{'residual':>10}")
    for task in args.tasks:
        operator, sigma = TASKS[task]
        generator = torch.Generator().manual_seed(1)
        y = operator.measure(x)
        y = y + sigma * torch.randn(y.shape, generator=generator)
        degraded = operator.lift(y)
        right = accuracy(classifier, degraded, labels)
        print(f"{task:>22}{'input':>16}{rmse(degraded, x):>9.3f}{'':>7}{right:>9.1%}")
        for restore in args.restore:
            sampler = AnnealedLangevinSampler(net, levels=args.levels, steps_per_level=args.steps, restore=restore)
            y_twice, labels_twice, x_twice = (part.repeat_interleave(args.draws, 0) for part in (y, labels, x))
            begin = time.perf_counter()
            samples = sampler.sample(
                observation=Observation(operator, y_twice, sigma), generator=generator, batch_size=64
            )
            seconds = time.perf_counter() - begin
            draws = samples.view(len(x), args.draws, *x.shape[1:])
            spread = draws.var(1).mean().mul(2).sqrt()
            error = f"{rmse(samples, x_twice):>9.3f} ({rmse(draws.mean(1), x):.3f})"
            print(
                f"{'':>22}{restore:>16}{error:<16}{accuracy(classifier, samples, labels_twice):>9.1%}{spread:>11.3f}"
                f"{rmse(operator.measure(samples), y_twice):>10.3f}  {seconds:.0f} s",
                flush=True,
            )
            if args.out is not None:
                rows = [part[:8] for part in (degraded.clamp(0, 1), *draws.unbind(1), x)]
                save_image(grid(torch.cat(rows), columns=8), args.out / f"{task.replace(', ', '-')}-{restore}.png")


if __name__ == "__main__":
    main()
