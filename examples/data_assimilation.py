"""Data assimilation: the path of a chaotic system from few noisy measurements, by a network and by particles.

    python examples/data_assimilation.py --out runs/lorenz

A network learns noisy paths of the Lorenz system as signals. The first coordinate is measured at every fourth step.
Draws of the posterior are compared with the paths that a bootstrap particle filter, which knows the equations, keeps.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scorematch import NoiseSchedule, ScoreNet
from scorematch.restoration import Linear, Observation, summary
from scorematch.sampling import ParticleSampler
from scorematch.training import train

STEP, LENGTH, EVERY, NOISE = 0.05, 32, 4, 2.0


def drift(x: Tensor) -> Tensor:  # (N, 3)
    a, b, c = x.T
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], 1)


def advance(x: Tensor) -> Tensor:
    """A step of the method of Runge and Kutta, and noise."""
    k2 = drift(x + STEP / 2 * drift(x))
    k3 = drift(x + STEP / 2 * k2)
    return x + STEP / 6 * (drift(x) + 2 * k2 + 2 * k3 + drift(x + STEP * k3)) + 0.5 * STEP**0.5 * torch.randn(x.shape)


def paths(n: int, y: Tensor | None = None) -> Tensor:
    """Paths (N, 3, L) from the attractor; with measurements y, those that a particle filter keeps."""
    x, path = torch.tensor([0.0, 0.0, 25.0]) + 5 * torch.randn(n, 3), torch.empty(n, 3, 0)
    for _ in range(100):
        x = advance(x)
    for i in range(LENGTH):
        path = torch.cat([path, (advance(path[:, :, -1]) if i > 0 else x)[:, :, None]], 2)
        if y is not None and i % EVERY == 0:
            weights = (-((path[:, 0, -1] - y[i // EVERY]).double() ** 2) / (2 * NOISE**2)).softmax(0)
            path = path[torch.multinomial(weights, n, replacement=True)]
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/lorenz"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a test")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure

    examples, steps, cases, particles, levels = (200, 10, 2, 4, 6) if args.smoke else (50_000, 5000, 4, 1024, 60)
    torch.manual_seed(0)
    net = ScoreNet.unet(3, (LENGTH,), widths=(32, 64, 64), layers_per_block=1)
    net = train(net, paths(examples), args.out, images=64 * steps, batch_size=64, optimizer="muon", lr=0.01)
    sampler, found = ParticleSampler(net, NoiseSchedule.geometric(200, 0.16, levels), particles=particles), []
    figure = Figure(figsize=(9, 3), layout="constrained")
    for case, truth in enumerate(paths(cases)):
        y = truth[0, ::EVERY] + NOISE * torch.randn(LENGTH // EVERY)
        observation = Observation(Linear(lambda x: x[:, 0, ::EVERY]), y[None], sigma=NOISE)
        population = sampler.population(observation, generator=case)
        rows = torch.multinomial(population.weights[0], particles, replacement=True)
        own, exact = summary(population.particles[0, rows]), summary(paths(2 * examples, y))
        apart = (own.mean - exact.mean) / exact.deviation
        found.append([*own.errors(truth), *exact.errors(truth), float(apart.square().mean().sqrt())])
        for i, axis in enumerate(figure.subplots(1, 3) if case == 0 else ()):
            axis.plot(truth[i], "k")
            for mean, width in (exact.mean, 2 * exact.deviation), (own.mean, 2 * own.deviation):
                axis.fill_between(range(LENGTH), mean[i] - width[i], mean[i] + width[i], alpha=0.4)
    figure.savefig(args.out / "lorenz.png", dpi=70)
    numbers = ", ".join(f"{value:.2f}" for value in torch.tensor(found).square().mean(0).sqrt().tolist())
    print(f"rmse of the mean and deviation of the draws, of the particles; distance of the means: {numbers}")


if __name__ == "__main__":
    main()
