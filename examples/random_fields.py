"""Random fields with a parameter: samples whose spectrum follows it, a gap, and super-resolution.

    python examples/random_fields.py --out runs/fields

The fields are log-normal and periodic, exp(0.7 g), where g is Gaussian with the power spectrum |k|^-slope and the
variance 1. The network has circular padding, and the slope is its condition.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from scorematch import ScoreNet
from scorematch.evaluation import power_spectrum, spectrum_error
from scorematch.restoration import AveragePool, Mask, Observation, summary
from scorematch.sampling import ODESampler, recommended_sampler
from scorematch.training import LevelMixture, LogNormal, LogUniform, train

SIDE, PANELS = 32, ("field", "measured", "mean", "draw", "deviation")


def fields(slope: torch.Tensor) -> torch.Tensor:
    """Fields (N, 1, 32, 32) for slopes (N, 1)."""
    k = torch.fft.fftfreq(SIDE, 1 / SIDE)
    square = (k[:, None] ** 2 + k**2).clamp(min=1)
    power = square ** (-slope[:, :, None] / 2)
    power[:, 0, 0] = 0
    power = power / power.mean((1, 2), keepdim=True)
    white = torch.fft.fft2(torch.randn(len(slope), SIDE, SIDE))
    return (0.7 * torch.fft.ifft2(white * power.sqrt()).real).exp()[:, None]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/fields"))
    parser.add_argument("--smoke", action="store_true", help="a few steps, as a test")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure

    examples, steps, n, draws = (100, 5, 4, 2) if args.smoke else (100_000, 5000, 512, 32)
    torch.manual_seed(0)
    slope = 1.5 + 3 * torch.rand(examples, 1)  # beyond 2 and 4: a network is least accurate at the ends
    options = {"widths": (64, 128), "layers_per_block": 1, "padding": "circular", "patch": 2, "pixel_channels": 16}
    net = ScoreNet.unet(1, SIDE, condition_features=1, **options)
    data = {"x": fields(slope), "condition": slope}
    levels = LevelMixture((LogNormal(-0.5, 1.2), LogNormal(-0.5, 1.2), LogUniform(0.5, 100)))
    training = {"levels": levels, "augment": ["shift"], "optimizer": "muon", "lr": 0.005, "fixed_norms": True}
    net = train(net, data, args.out, images=32 * steps, batch_size=32, **training)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    (spectra, *gap), (values, *coarse) = figure.subplots(2, 6)
    for i, value in enumerate((2.0, 3.0, 4.0)):
        exact = fields(condition := torch.full((n, 1), value))
        drawn = recommended_sampler(net).sample(n, condition=condition, generator=0, progress=False)
        error, floor = spectrum_error(drawn, exact), spectrum_error(fields(condition), exact)
        print(f"slope {value:g}: spectrum {error[0]}, largest {error[1]}; of new fields {floor[0]}, {floor[1]}")
        for x, ls in (exact, "-"), (drawn, ":"):
            spectra.loglog(range(1, 17), power_spectrum(x).mean((0, 1))[1:17], ls, color=f"C{i}")
            values.hist(x.flatten().numpy(), torch.linspace(0, 12, 61), log=True, histtype="step", ls=ls, color=f"C{i}")
    spectra.set_title("spectra, samples dotted")
    values.set_title("values, samples dotted")

    truth, hidden = fields(torch.full((1, 1), 3.0)), torch.zeros(SIDE, SIDE, dtype=torch.bool)
    hidden[8:24, 8:24] = True
    for name, operator, where, row in ("gap", Mask(~hidden), hidden, gap), ("means", AveragePool(4), None, coarse):
        y = operator.measure(truth)
        given = {"condition": torch.full((draws, 1), 3.0), "observation": Observation(operator, y, sigma=0.02)}
        drawn = ODESampler(net, levels=32, method="heun").sample(draws, **given, generator=0, progress=False)
        found = summary(drawn)
        print("{}: rmse of the mean {:.3f}, deviation {:.3f}".format(name, *found.errors(truth[0], where)))
        shown = truth[0], y[0], found.mean, drawn[0], found.deviation
        for axis, title, x in zip(row, PANELS, shown, strict=True):
            axis.imshow(x[0].numpy(), vmin=0, vmax=None if title == "deviation" else float(truth.max()))
            axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(args.out / "fields.png", dpi=70)


if __name__ == "__main__":
    main()
