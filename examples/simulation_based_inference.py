"""Simulation-based inference: the posterior of a simulator's parameters, learned from simulations.

    python examples/simulation_based_inference.py --out runs/sbi

A network learns the score of the parameters theta given an observation x. C2ST compares its draws for new observations
with those of the true posterior: 0.5 is best, 1 is worst.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from simulators import TASKS, Task, prior
from torch import Tensor

from scorematch import ScoreNet
from scorematch.evaluation import classifier_two_sample_test
from scorematch.sampling import ODESampler
from scorematch.training import train


def posterior_draws(net: ScoreNet, task: Task, x: Tensor, n: int) -> Tensor:
    """At most n draws, without the few that leave the prior."""
    sampler = ODESampler(net, levels=36, method="unipc")
    draws = sampler.sample(4 * n, condition=x.expand(4 * n, -1), generator=0, progress=False)
    return draws[(draws.abs() < task.bound).all(1)][:n]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/sbi"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a test")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure

    simulations, draws, observations = (300, 50, 1) if args.smoke else (10_000, 2000, 5)
    for name in args.tasks:
        torch.manual_seed(0)
        task = TASKS[name]
        theta = prior(task, simulations)
        net = ScoreNet.mlp(task.sizes[0], condition_features=task.sizes[1], width=128, depth=3)
        data = {"x": theta, "condition": task.simulate(theta)}
        images = 256 * (5 if args.smoke else task.steps)
        net = train(net, data, args.out / name, images=images, batch_size=256, progress=not args.smoke)
        found = []
        for x in task.simulate(prior(task, observations)):
            drawn, exact = posterior_draws(net, task, x, draws), task.posterior(x, draws)
            if name == "two-moons":
                figure = Figure(figsize=(6, 3), layout="constrained")
                for axis, theta in zip(figure.subplots(1, 2, sharex=True, sharey=True), (drawn, exact), strict=True):
                    axis.plot(*theta.T, ".", markersize=1)
                figure.savefig(args.out / "two-moons.png", dpi=70)
            found.append(classifier_two_sample_test(drawn, exact[: len(drawn)]).value)
        print(f"{name}: C2ST {sum(found) / len(found):.3f}, {', '.join(f'{value:.3f}' for value in found)}")


if __name__ == "__main__":
    main()
