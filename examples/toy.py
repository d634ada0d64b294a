"""The two-dimensional figures of Song & Ermon (2019): a mixture of two Gaussians, whose score is known.

    python examples/toy.py --out runs/toy

The data are 0.8 N((5, 5), I) + 0.2 N((-5, -5), I). The program writes two figures and prints the numbers in them:

- ``scores.png`` (Figure 2 of the paper): a score learned from clean data is accurate where there are data, and wrong
  around and between the modes, where there are none.
- ``samples.png`` (Figure 3): Langevin dynamics on the score of the clean data keeps the shares of the modes that its
  start has. Annealed Langevin dynamics finds the correct shares, with the exact score and with a learned one.

The paper's program uses sigma as the standard deviation of a mode with noise; here it is sqrt(1 + sigma^2).
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.loss import sliced_score_matching_loss

WEIGHTS = torch.tensor([0.8, 0.2])
MEANS = torch.tensor([[5.0, 5.0], [-5.0, -5.0]])
SCHEDULE = NoiseSchedule.geometric(20, 0.1, 30)


def exact_score(x: Tensor, sigma: float | Tensor) -> Tensor:
    """The score of the mixture with noise of level sigma, for x (N, 2)."""
    variance = 1 + torch.as_tensor(sigma) ** 2
    variance = variance if variance.ndim == 0 else variance[:, None]
    difference = MEANS - x[:, None]  # (N, 2 modes, 2)
    logits = WEIGHTS.log() - (difference**2).sum(-1) / (2 * variance)
    return (logits.softmax(1)[..., None] * difference).sum(1) / variance


def draw_data(n: int, generator: torch.Generator) -> Tensor:
    mode = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[mode] + torch.randn(n, 2, generator=generator)


class Perceptron(nn.Module):
    """Points (N, 2) and, optionally, their noise levels (N,) -> vectors (N, 2)."""

    def __init__(self, takes_sigma: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 if takes_sigma else 2, 128),
            nn.Softplus(),
            nn.Linear(128, 128),
            nn.Softplus(),
            nn.Linear(128, 2),
        )
        self.takes_sigma = takes_sigma

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:  # noqa: D102
        if not self.takes_sigma:
            return self.layers(x)
        scale = (1 + sigma**2).sqrt()[:, None]  # inputs of order one at every level
        return self.layers(torch.cat([x / scale / 5, scale.log()], dim=1))


def train(net: nn.Module, loss: Callable[[Tensor], Tensor], steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss(draw_data(128, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()


def share_of_larger_mode(x: Tensor) -> float:
    return float((x.sum(1) > 0).float().mean())


def plot_scores(path: Path, clean: Tensor, exact: Tensor, learned: Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    side = int(len(clean) ** 0.5)
    for axis, field, title in [(axes[0], exact, "exact score"), (axes[1], learned, "learned by sliced score matching")]:
        axis.quiver(*clean.T.numpy(), *field.T.numpy(), angles="xy", scale=140, width=0.004)
        axis.set_title(title)
    error = (learned - exact).norm(dim=1).view(side, side).numpy()
    image = axes[2].imshow(error.T, origin="lower", extent=(-8, 8, -8, 8), cmap="magma_r", vmin=0)
    axes[2].set_title("norm of the error")
    figure.colorbar(image, ax=axes[2])
    for axis in axes:
        axis.plot(*MEANS.T.numpy(), "+", color="tab:red", markersize=10)
        axis.set_aspect("equal")
    figure.savefig(path, dpi=110)


def plot_samples(path: Path, samples: dict[str, Tensor]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(samples), 3.7), layout="constrained")
    for axis, (name, x) in zip(figure.subplots(1, len(samples)), samples.items(), strict=True):
        axis.plot(*x.T.numpy(), ".", markersize=2)
        axis.set(title=f"{name}\n{share_of_larger_mode(x):.0%} in the larger mode", xlim=(-10, 10), ylim=(-10, 10))
        axis.set_aspect("equal")
    figure.savefig(path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder for the two figures")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps of each network")
    parser.add_argument("--n", type=int, default=1280, help="samples per method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a test")
    args = parser.parse_args(argv)
    if args.smoke:
        args.steps, args.n = 20, 50
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)

    # Figure 2: the score of clean data, learned without noise.
    net = Perceptron(takes_sigma=False)
    train(net, lambda x: sliced_score_matching_loss(net, x, sigma=1.0, noise=torch.zeros_like(x)), args.steps, rng)
    line = torch.linspace(-8, 8, 20)
    points = torch.cartesian_prod(line, line)
    with torch.no_grad():
        exact, estimate = exact_score(points, 0.0), net(points, torch.ones(len(points)))
    error = (estimate - exact).norm(dim=1)
    near = torch.cdist(points, MEANS).amin(1) < 2
    print(
        f"error of the learned score: {error[near].mean():.2f} within a distance of 2 of a mode, "
        f"{error[~near].mean():.2f} elsewhere"
    )
    plot_scores(args.out / "scores.png", points, exact, estimate)

    # Figure 3: plain and annealed Langevin dynamics.
    start = torch.rand(args.n, 2, generator=rng) * 16 - 8
    # Plain: the score of the clean data at any sigma. The paper's step of 0.1 is 0.05 in this package's convention.
    plain = AnnealedLangevinSampler(
        lambda x, sigma: exact_score(x, 0.0), NoiseSchedule([1.0]), steps_per_level=1000, step_size=0.05, denoise=False
    )
    conditional = ScoreNet(Perceptron(takes_sigma=True), SCHEDULE, precondition="ncsnv2", sample_shape=(2,))
    train(conditional, lambda x: dsm_loss(conditional, x), args.steps, rng)
    # 100 steps per level, as in the paper: with 5 the share of the larger mode is 76 %.
    steps = 2 if args.smoke else 100
    annealed = AnnealedLangevinSampler(exact_score, SCHEDULE, steps_per_level=steps)
    learned = AnnealedLangevinSampler(conditional, steps_per_level=steps)
    print(annealed)
    quiet = {"generator": rng, "progress": False}
    samples = {
        "data": draw_data(args.n, rng),
        "Langevin": plain.sample(init=start, **quiet),
        "annealed Langevin": annealed.sample(args.n, shape=(2,), **quiet),
        "annealed, learned score": learned.sample(args.n, **quiet),
    }
    for name, x in samples.items():
        share = share_of_larger_mode(x)
        print(f"{name}: {share:.3f} +- {(share * (1 - share) / args.n) ** 0.5:.3f} in the larger mode, which has 0.8")
    plot_samples(args.out / "samples.png", samples)


if __name__ == "__main__":
    main()
