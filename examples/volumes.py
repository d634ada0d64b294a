"""Volumes of 32x32x32 values: samples, and a gap filled, beside exact draws from its posterior.

    python examples/volumes.py --out runs/volumes

The volumes are periodic Gaussian random fields with the power spectrum |k|^-4 and the variance 1. Their posterior mean
solves a linear system with the covariance, here by conjugate gradients, and so do exact draws.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scorematch import ScoreNet
from scorematch.data import save_plot
from scorematch.evaluation import power_spectrum, spectrum_error
from scorematch.restoration import Mask, Observation, conjugate_gradients, summary
from scorematch.sampling import ODESampler
from scorematch.training import train

SIDE, AXES, SIGMA = 32, (-3, -2, -1), 0.1
K = torch.stack(torch.meshgrid(*[torch.fft.fftfreq(SIDE, 1 / SIDE)] * 3, indexing="ij")).norm(dim=0)
POWER = K.clamp(min=1) ** -4 * (K > 0)
POWER = POWER / POWER.mean()


def covariance(x: Tensor, power: Tensor = POWER) -> Tensor:
    return torch.fft.ifftn(torch.fft.fftn(x, dim=AXES) * power, dim=AXES).real


def volumes(n: int) -> Tensor:
    return covariance(torch.randn(n, 1, SIDE, SIDE, SIDE), POWER.sqrt())


def posterior_mean(y: Tensor, known: Tensor) -> Tensor:
    """C M (M C M + sigma^2)^-1 y for volumes that are measured, with noise, where ``known``."""

    def system(v: Tensor) -> Tensor:
        return known * covariance(v) + SIGMA**2 * v

    return covariance(conjugate_gradients(system, y * known, iterations=200))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/volumes"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a test")
    args = parser.parse_args(argv)

    examples, images, n, draws, calls = (16, 32, 2, 2, 3) if args.smoke else (1000, 3200, 64, 8, 36)
    torch.manual_seed(0)
    small = {"widths": (32, 64), "layers_per_block": 1, "patch": 4, "pixel_channels": 8}
    net = ScoreNet.unet(1, (SIDE,) * 3, padding="circular", **small)
    options = {"batch_size": 4, "optimizer": "muon", "lr": 0.01, "augment": ["shift", "flip"]}
    net = train(net, volumes(examples), args.out, images=images, **options)
    sampler = ODESampler(net, levels=calls, method="unipc")
    x, exact = sampler.sample(n, generator=0, progress=False), volumes(n)
    for name, drawn in ("samples", x), ("new volumes", volumes(n)):
        error, share = spectrum_error(drawn, exact), power_spectrum(drawn).mean(0) / power_spectrum(exact).mean(0)
        print(f"{name}: deviation {drawn.std():.3f}; spectrum {error[0]}, largest {error[1]}\n  {share[0, 1:9]}")

    truth, known = volumes(1), torch.ones(SIDE, SIDE, SIDE, dtype=torch.bool)
    known[8:24, 8:24, 8:24] = False
    y, prior = (truth + SIGMA * torch.randn_like(truth)) * known, volumes(draws)
    mean = posterior_mean(y, known)
    right = mean + prior - posterior_mean(prior + SIGMA * torch.randn_like(prior), known)
    sampler = ODESampler(net, levels=calls, method="dpm-solver++", restore="moment-matching")
    filled = sampler.sample(draws, observation=Observation(Mask(known), y, SIGMA), generator=0, progress=False)
    for name, found in ("draws", filled), ("exact draws", right):
        error, deviation = summary(found).errors(truth[0], ~known)
        print(f"{name}, in the gap: rmse of their mean {error:.3f}, deviation {deviation:.3f}")
    print(f"the exact mean: rmse {(mean - truth)[..., ~known].square().mean().sqrt():.3f}")
    save_plot(torch.cat([x[:1], truth, y, filled[:1], mean]), args.out / "volumes.png")


if __name__ == "__main__":
    main()
