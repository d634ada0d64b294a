"""How good are restorations? Four degradations of test digits, restored by a network that was not trained for it.

    python examples/evaluate_restoration.py --data FOLDER                            # 500 digits, "mnist"
    python examples/evaluate_restoration.py --data FOLDER --restore guide --n 100 --tasks pool

Each digit is restored ``--draws`` times. The figures, each beside that of the degraded digits themselves:

- rmse: root mean square error to the original (and that of the mean of the draws, in brackets);
- right: the share that a classifier of digits (evaluate_mnist.py) reads as what they are;
- diversity: root mean square difference of two draws;
- residual: root mean square of y - A x, of pixels as seen: 0 where y has no noise, its noise's deviation where it has.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from evaluate_mnist import Classifier, load_classifier, read
from mnist import load_digits
from torch import Tensor

from scorematch import AnnealedLangevinSampler, ScoreNet
from scorematch.images import grid, save_image
from scorematch.observe import JPEG, AveragePool, Mask, Observation, Operator, Uncrop

STROKE = 3.5  # half the width of the free mask's line, in pixels of 28


def free_mask(height: int, width: int) -> Tensor:
    """A mask with a hole drawn as one thick wave from the upper left to the lower right."""
    y, x = torch.meshgrid(torch.linspace(0, 28, height), torch.linspace(0, 28, width), indexing="ij")
    t = torch.linspace(0, 1, 200)
    line_x, line_y = 3 + 22 * t, 14 + 9 * torch.sin(2 * math.pi * t)
    return ((x[..., None] - line_x) ** 2 + (y[..., None] - line_y) ** 2).amin(-1) > STROKE**2


TASKS: dict[str, tuple[Operator, float]] = {
    "free mask": (Mask(free_mask(28, 28)), 0.0),
    "right half": (Uncrop(right=14), 0.0),
    "right half, noise 0.2": (Uncrop(right=14), 0.2),
    "pool 4": (AveragePool(4), 0.0),
    "pool 4, noise 0.05": (AveragePool(4), 0.05),
    "jpeg 5": (JPEG(5), 0.0),
    "jpeg 1": (JPEG(1), 0.0),
}


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def right(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    return float((read(classifier, images.clamp(0, 1))[0].argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST; torchvision downloads it otherwise")
    parser.add_argument("--model", default="mnist", help='a short name or a folder ("mnist")')
    parser.add_argument("--n", type=int, default=500, help="how many test digits")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--restore", nargs="+", default=["replace"], choices=["replace", "guide", "guide-jacobian"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--levels", type=int, help="of consistent sampling; the network's own settings otherwise")
    parser.add_argument("--steps", type=int, help="Langevin steps at each level, instead of consistent sampling")
    parser.add_argument("--classifier", type=Path, default=Path("runs/digit_classifier.pt"))
    parser.add_argument("--out", type=Path, help="folder for a picture of each task's first strips")
    args = parser.parse_args()

    classifier = load_classifier(args.classifier, args.data)
    test, labels = load_digits(args.data, "test")
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: args.n]
    x, labels = test[chosen].float() / 255, labels[chosen]
    net = ScoreNet.from_pretrained(args.model).to(memory_format=torch.channels_last)
    ladder = None if args.levels is None else net.schedule.respaced(args.levels)
    consistent = None if ladder is None or args.steps is not None else True
    print(f"{args.n} test digits, of which the classifier reads {right(classifier, x, labels):.1%} right")
    print(f"{'':>38}{'rmse':>16}{'right':>9}{'diversity':>11}{'residual':>10}")
    for task in args.tasks:
        operator, sigma = TASKS[task]
        generator = torch.Generator().manual_seed(1)
        y = operator.measure(x)
        y = y + sigma * torch.randn(y.shape, generator=generator)
        seen = operator.lift(y)
        print(f"{task:>22}{'as it is':>16}{rms(seen - x):>9.3f}{'':>7}{right(classifier, seen, labels):>9.1%}")
        for restore in args.restore:
            sampler = AnnealedLangevinSampler(
                net, ladder, steps_per_level=args.steps, consistent=consistent, restore=restore
            )
            twice = [part.repeat_interleave(args.draws, 0) for part in (y, labels, x)]
            begin = time.perf_counter()
            samples = sampler.sample(
                observation=Observation(operator, twice[0], sigma), generator=generator, batch_size=64
            )
            seconds = time.perf_counter() - begin
            draws = samples.view(args.n, args.draws, *x.shape[1:])
            spread = draws.var(1).mean().mul(2).sqrt()
            print(
                f"{'':>22}{restore:>16}{rms(samples - twice[2]):>9.3f} ({rms(draws.mean(1) - x):.3f})"[:54]
                + f"{right(classifier, samples, twice[1]):>9.1%}{spread:>11.3f}"
                f"{rms(operator.measure(samples) - twice[0]):>10.3f}  {seconds:.0f} s",
                flush=True,
            )
            if args.out is not None:
                rows = [part[:8] for part in (seen.clamp(0, 1), *draws.unbind(1), x)]
                save_image(grid(torch.cat(rows), columns=8), args.out / f"{task.replace(', ', '-')}-{restore}.png")


if __name__ == "__main__":
    main()
