r"""The power spectrum and the distribution of the values of signals, fields and volumes (N, C, ...).

With the discrete Fourier transform :math:`\hat x_k = \tfrac1M \sum_j x_j e^{-2 \pi i k \cdot j / \text{sides}}` of M
values, the power at the wave number K is the sum of :math:`|\hat x_k|^2` over all k whose length rounds to K:

.. math:: P(K) = \sum_{|k| \in [K - \frac12, K + \frac12)} |\hat x_k|^2, \qquad
          \sum_K P(K) = \tfrac1M \sum_j x_j^2 \quad \text{(Parseval)} .

K counts periods along the longest axis; along a shorter one they count as many more. P is isotropic: it does not depend
on the direction of k. A signal that is not periodic has an additional power of order 1 / K^2 from the jump between
its ends, in samples and data alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scorematch.core.randomness import single_generator
from scorematch.evaluation.distances import error_of, wasserstein
from scorematch.evaluation.estimate import Estimate
from scorematch.evaluation.rows import double, draw

_MOST, _RESAMPLED = 0.99, 200  # the share of the power that is compared, and bootstrap samples
_NONE = 1e-12  # the largest share of a power that may be that of rounding
_VALUES = 2**21  # values of each set that are sorted
_AT_ONCE = 2**20  # values that are transformed together


def power_spectrum(x: Tensor) -> Tensor:
    """The isotropic power spectrum of data (N, C, ...), with one, two or three spatial axes.

    Returns:
        The power of each sample and channel at the wave numbers 0, 1, ...: (N, C, K), float64. It sums to the mean
        square of the values.

    Example:
        >>> wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16)
        >>> power_spectrum(wave.view(1, 1, 16))[0, 0, :5].round(decimals=9)
        tensor([0.0000, 0.0000, 0.0000, 0.5000, 0.0000], dtype=torch.float64)
    """
    if x.ndim < 3:
        raise ValueError(f"a spectrum is for signals and fields (N, C, ...), got shape {tuple(x.shape)}.")
    sides, axes = x.shape[2:], tuple(range(2, x.ndim))
    along = [torch.fft.fftfreq(side, 1 / max(sides), dtype=torch.float64, device="cpu") for side in sides]
    lengths = sum(each.square() for each in torch.meshgrid(*along, indexing="ij"))
    shells = (lengths.sqrt() + 0.5).long().flatten()  # type: ignore[union-attr]
    found, count = [], int(shells.max()) + 1
    for part in x.split(max(1, _AT_ONCE // math.prod(x.shape[1:]))):
        power = torch.fft.fftn(double(part), dim=axes, norm="forward").abs().square().flatten(2)
        found.append(power.new_zeros(*power.shape[:2], count).index_add_(2, shells.to(power.device), power))
    return torch.cat(found)


def spectrum_error(
    samples: Tensor, reference: Tensor, *, generator: torch.Generator | int | None = 0
) -> tuple[Estimate, Estimate]:
    """The relative error of the mean power spectrum of samples (N, C, ...) from that of data (M, C, ...).

    Each channel is standardized by its mean and its standard deviation in the data. Otherwise wave number 0 would have
    nearly all power of values such as 280 +- 10 kelvin, and channels of small values would have none.

    Args:
        samples: the samples.
        reference: the data.
        generator: the source of the bootstrap samples.

    Returns:
        The root mean square, weighted by the power, and the largest, over the wave numbers with the most power that
        together hold 99 % of it; each with its standard error by bootstrap, None if so few data have power at one of
        these wave numbers that bootstrap samples of them have none. Channels count separately.

    Raises:
        ValueError: if samples and data have different shapes, or all data are equal.
    """
    _check_shapes(samples, reference)
    floats = reference.to(torch.promote_types(reference.dtype, torch.float32))  # whole numbers have no deviation
    std, mean = torch.std_mean(floats, [0, *range(2, reference.ndim)], keepdim=True)
    std = torch.where(std > 0, std, 1)
    x, y = (power_spectrum((each - mean) / std).flatten(1) for each in (samples, reference))
    power = y.mean(0)
    if not power.sum() > 0:  # also true for NaN
        raise ValueError("reference must be finite and not constant, since its spectrum is the unit of the error.")
    order = power.argsort(descending=True)
    kept = order[: 1 + int((power[order].cumsum(0) < _MOST * power.sum()).sum())]
    x, y, rng = x[:, kept], y[:, kept], single_generator(generator)

    def means(rows: Tensor) -> Tensor:
        """The mean spectrum of all rows, and those of bootstrap samples of them."""
        drawn = torch.randint(len(rows), (_RESAMPLED, len(rows)), generator=rng, device="cpu").to(rows.device)
        counts = rows.new_zeros(_RESAMPLED, len(rows)).scatter_add_(1, drawn, rows.new_ones(1).expand(drawn.shape))
        return torch.cat([rows.mean(0)[None], counts @ rows / len(rows)])

    above, below = means(x), means(y)
    known = bool((below > _NONE * below[0]).all())
    errors = (above / below - 1).abs()
    found = ((errors.square() * below).sum(1) / below.sum(1)).sqrt(), errors.amax(1)
    spreads = [float(each[1:].std()) if known else None for each in found]
    return tuple(Estimate(float(each[0]), spread) for each, spread in zip(found, spreads, strict=True))  # type: ignore[return-value]


def values_distance(samples: Tensor, reference: Tensor) -> Estimate:
    """The Wasserstein distance of the distributions of single values of samples (N, C, ...) and data (M, C, ...).

    The mean over the channels, each in units of the values given; of large sets a part of each sample is used.

    Returns:
        The distance and its standard error over the samples.

    Raises:
        ValueError: if samples and data have different shapes.
    """
    _check_shapes(samples, reference)
    x, y = (each.reshape(*each.shape[:2], -1) for each in (samples, reference))
    step = max(1, x.shape[2] * max(len(x), len(y)) // _VALUES)
    places = draw(x.shape[2], max(1, x.shape[2] // step), single_generator(0)).sort().values.to(x.device)
    x, y = (double(each[..., places]).movedim(2, 1) for each in (x, y))  # (N, ..., C)
    columns = max(1, _VALUES // max(x.shape[:2].numel(), y.shape[:2].numel()))
    parts = zip(*(each.flatten(0, 1).split(columns, 1) for each in (x, y)), strict=True)
    value, h, g = (torch.cat(each, -1) for each in zip(*(wasserstein(*part) for part in parts), strict=True))
    over_x, over_y = (each.view(rows.shape).mean((1, 2)) for each, rows in ((h, x), (g, y)))
    return Estimate(float(value.mean()), error_of(over_x, over_y))


def _check_shapes(samples: Tensor, reference: Tensor) -> None:
    if samples.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"samples must have the shape of the data, {tuple(reference.shape[1:])} without the batch, got "
            f"{tuple(samples.shape[1:])}."
        )
