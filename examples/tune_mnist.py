"""Compares sampler settings on a trained network of digits, to choose those that are stored with it.

    python examples/tune_mnist.py --data FOLDER --model runs/mnist/network

Each line is one setting: the number of noise levels, the steps per level, the step in units of sigma^2, the kind of
noise, the network calls, and figures with the classifier of ``digit_classifier.py``. The last line has those of test
digits. ``scorematch.evaluation.tune`` and ``python -m scorematch tune`` do the same for any network, with a table of
settings for all samplers, and store the best.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from digit_classifier import add_options, load_classifier
from mnist import load_digits
from torch import Tensor

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.data import save_grid
from scorematch.evaluation import Evaluator, values


def power(p: float) -> Callable[[float], float]:
    """The step 1 - r^p, r being the ratio of neighboring levels: no noise for p = 1, ancestral sampling for p = 2."""
    return lambda ratio: 1 - ratio**p


# (levels, steps per level, step in units of sigma^2 or a rule for it, noise); a step of None is technique 4 of NCSNv2.
SETTINGS: list[tuple[int, int, float | Callable[[float], float] | None, str]] = [
    (50, 3, None, "plain"),
    (50, 3, None, "exact"),
    (95, 1, 0.5, "exact"),
    (95, 1, 0.7, "exact"),
    (50, 2, 0.7, "exact"),
    (150, 1, 0.5, "exact"),
    (200, 1, 0.4, "exact"),
    (200, 1, 0.6, "exact"),
    (50, 5, None, "exact"),
    (50, 1, 0.3, "consistent"),
    (100, 1, 0.3, "consistent"),
    (100, 1, 0.36, "consistent"),
    (100, 1, 0.5, "consistent"),
    (100, 1, 0.7, "consistent"),
    (100, 1, 1.0, "consistent"),
    (200, 1, 0.2, "consistent"),
    (200, 1, 0.36, "consistent"),
    (200, 1, 0.6, "consistent"),
    (50, 5, 0.25, "exact"),
    (50, 5, 0.3, "exact"),
    (80, 3, 0.3, "exact"),
    (100, 1, power(1.1), "consistent"),
    (100, 1, power(2), "consistent"),
    (250, 1, power(1.1), "consistent"),
    (250, 1, power(1.5), "consistent"),
    (250, 1, power(2), "consistent"),
]


def samplers(net: Any) -> Iterator[tuple[str, AnnealedLangevinSampler]]:
    """For each setting the start of its line and a sampler, on geometric levels in the range of the network's own."""
    for levels, steps, a, noise in SETTINGS:
        schedule = NoiseSchedule.geometric(net.schedule.sigma_max, net.schedule.sigma_min, levels)
        a = a(schedule[1] / schedule[0]) if callable(a) else a
        step_size = schedule.suggest_step_size(steps) if a is None else a * schedule.sigma_min**2
        kind = {"consistent": True} if noise == "consistent" else {"exact_noise": noise == "exact"}
        sampler = AnnealedLangevinSampler(net, schedule, steps_per_level=steps, step_size=step_size, **kind)
        a = step_size / schedule.sigma_min**2
        yield f"{levels:>6} {steps:>5} {a:.3f} {noise:>10} {len(sampler):>5}", sampler


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--n", type=int, default=500, help="samples per setting")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the first 64 samples of each setting")
    parser.add_argument("--only", type=int, nargs="+", help="run only these lines")
    args = parser.parse_args(argv)

    figures = digit_figures(args.data, args.classifier)
    net = ScoreNet.from_pretrained(args.model)
    print("line levels steps     a      noise calls | confident rarest frechet   std variation", flush=True)
    for line, (setting, sampler) in enumerate(samplers(net)):
        if args.only is not None and line not in args.only:
            continue
        samples = sampler.sample(args.n, generator=args.seed, progress=False)
        if args.out is not None:
            save_grid(samples[:64], args.out / f"settings-{line:02d}.png")
        print(f"{line:>4} {setting} | {row(figures(samples))}", flush=True)
    print(f"{'test digits':>37} | {row(figures(some_test_digits(args.data, args.n, args.seed)))}")


def digit_figures(data: Path | None, classifier: Path) -> Callable[[Tensor], dict[str, float]]:
    """A function that measures digits (N, 1, 28, 28): their figures by name, compared with the training digits."""
    evaluator = Evaluator(
        load_digits(data, "train")[0],
        features=load_classifier(classifier, data),
        metrics=["frechet", "classes"],
        progress=False,
    )
    return lambda images: values(evaluator.measure(images.split(1000)))


def some_test_digits(data: Path | None, n: int, seed: int) -> Tensor:
    """Random test digits (n, 1, 28, 28), uint8."""
    test, _ = load_digits(data, "test")
    return test[torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))[:n]]


def row(found: dict[str, float]) -> str:
    """The figures of one line."""
    return (
        f"{found['confident']:>9.1%} {found['rarest']:>6.1%} {found['frechet']:>7.2f} {found['std']:.3f} "
        f"{found['variation']:>9.4f}"
    )


if __name__ == "__main__":
    main()
