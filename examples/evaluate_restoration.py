"""Evaluates restoration: degraded test digits, restored with a network that was not trained for it.

    python examples/evaluate_restoration.py --data FOLDER                            # 500 digits, "mnist"
    python examples/evaluate_restoration.py --data FOLDER --restore guide --n 100 --tasks "pool 4"

The program calls ``scorematch.evaluation.evaluate_restoration`` for each task and method, with the classifier of
``digit_classifier.py`` as the extractor. Each digit is restored ``--draws`` times. These figures are printed for the
degraded digits ("input") and for each method:

- rmse: the root mean square error to the original, and in brackets that of the mean of the draws;
- accuracy: the share that the classifier classifies correctly;
- diversity: the root mean square difference of two draws;
- residual: the root mean square of y - A x, the difference between the measurement y and that of the result x. It
  should be 0, or the standard deviation of the noise in y.
"""

import argparse
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from digit_classifier import add_options, load_classifier
from mnist import load_digits
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.evaluation import evaluate_restoration
from scorematch.restoration import Mask, Operator
from scorematch.restoration.methods import METHODS

STROKE = 3.5  # half the width of the line of the free-form mask, in pixels of 28


def free_mask(height: int, width: int) -> Tensor:
    """A mask (H, W), True outside a thick wave from the upper left to the lower right."""
    y, x = torch.meshgrid(torch.linspace(0, 28, height), torch.linspace(0, 28, width), indexing="ij")
    t = torch.linspace(0, 1, 200)
    line_x, line_y = 3 + 22 * t, 14 + 9 * torch.sin(2 * math.pi * t)
    return ((x[..., None] - line_x) ** 2 + (y[..., None] - line_y) ** 2).amin(-1) > STROKE**2


TASKS: dict[str, tuple[str | Operator, float]] = {  # an operator, and the noise in its measurement
    "free mask": (Mask(free_mask(28, 28)), 0.0),
    "right half": ("uncrop:right=14", 0.0),
    "right half, noise 0.2": ("uncrop:right=14", 0.2),
    "pool 4": ("pool:4", 0.0),
    "pool 4, noise 0.05": ("pool:4", 0.05),
    "jpeg 5": ("jpeg:5", 0.0),
    "jpeg 1": ("jpeg:1", 0.0),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--n", type=int, default=500, help="number of test digits")
    parser.add_argument("--draws", type=int, default=2, help="restorations of each digit")
    parser.add_argument("--restore", nargs="+", default=["replace"], choices=METHODS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--levels", type=int, help="number of noise levels (default: the network's settings)")
    parser.add_argument("--steps", type=int, help="Langevin steps per level, instead of consistent sampling")
    parser.add_argument("--out", type=Path, help="folder for all figures, and a picture of each task and method")
    args = parser.parse_args(argv)

    classifier = load_classifier(args.classifier, args.data)
    net = ScoreNet.from_pretrained(args.model)
    print(f"{'':>38}{'rmse':>16}{'accuracy':>9}{'diversity':>11}{'residual':>10}")
    for task in args.tasks:
        operator, sigma = TASKS[task]
        for restore in args.restore:
            begin = time.perf_counter()
            options = {"levels": args.levels, "steps_per_level": args.steps, "restore": restore}
            result = evaluate_restoration(
                net,
                load_digits(args.data, "test"),
                operator,
                n=args.n,
                draws=args.draws,
                sigma=sigma,
                features=classifier,
                metrics=[],
                labels=True,
                sampler=partial(AnnealedLangevinSampler, **options),
                out=None if args.out is None else args.out / f"{task.replace(', ', '-')}-{restore}",
                progress=False,
            )
            seconds = time.perf_counter() - begin
            restored, degraded = (
                {name: figure.value for found in result.figures[column].values() for name, figure in found.items()}
                for column in ("restored", "degraded")
            )
            if restore == args.restore[0]:
                print(f"{task:>22}{'input':>16}{degraded['rmse']:>9.3f}{'':>7}{degraded['accuracy']:>9.1%}")
            of_mean = f" ({restored['rmse of the mean']:.3f})" if args.draws > 1 else ""
            print(
                f"{'':>22}{restore:>16}{restored['rmse']:>9.3f}{of_mean:<7}{restored['accuracy']:>9.1%}"
                f"{restored.get('diversity', 0):>11.3f}{restored['consistency']:>10.3f}  {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
