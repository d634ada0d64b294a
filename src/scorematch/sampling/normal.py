r"""A start at a moderate noise level, from the normal distribution of the noisy data.

Where the noise covers all but the coarse structure of the data, their density is nearly normal, with the mean
:math:`\mu` and the covariance of the data, here :math:`F^\top \operatorname{diag}(\lambda)\, F` in cosines. For normal
data the probability flow from noise :math:`z` of the highest level has the solution

.. math:: x_\sigma = \mu + F^\top \sqrt{\lambda + \sigma^2}\; F z ,

so that the steps above sigma are not needed. Noise alone, :math:`\mu + \sigma z`, would lack the variance of the
coarse structure: the brightness of a CIFAR-10 image has a standard deviation of 6.9 along its cosine.

References:
    Wang & Vastola, 2024, The Unreasonable Effectiveness of Gaussian Score Approximation, arXiv:2412.09726.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.cosines import Cosines

__all__ = ["data_moments"]


class Moments(TypedDict):
    """The options of ``ODESampler`` that describe the normal distribution of the data."""

    data_mean: list[float]
    data_spectrum: list[float]


def data_moments(data: Tensor) -> Moments:
    """The mean and the spectrum of data, as options of ``ODESampler`` that start below the highest noise level.

    Args:
        data: samples of the data or of a network (N, C, ...), with N of at least 2; some thousand.

    Returns:
        ``data_mean``, the mean of each channel, and ``data_spectrum``, the mean variance of the cosines in each band of
        frequencies: first the bands of the mean over the channels, then those of differences of channels.

    Raises:
        ValueError: if there are fewer than two samples.

    Example:
        >>> import torch
        >>> images = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 3
        >>> {name: [round(value) for value in values] for name, values in data_moments(images).items()}
        {'data_mean': [3], 'data_spectrum': [1, 1, 1, 1, 1, 1, 1, 1]}
    """
    if data.ndim < 2 or len(data) < 2:
        raise ValueError(f"data must be two or more samples (N, C, ...), got shape {tuple(data.shape)}.")
    cosines = Cosines(data)
    mean = data.transpose(0, 1).flatten(1).mean(1)
    spectrum = cosines.means(cosines.transform(data).var(0)[None])[0]
    return {"data_mean": _rounded(mean), "data_spectrum": _rounded(spectrum)}


def normal_start(z: Tensor, sigma: float, mean: Sequence[float], spectrum: Sequence[float]) -> Tensor:
    """The states at the level sigma from standard normal noise z (n, C, ...)."""
    cosines = Cosines(z)
    for name, values, count in (("data_mean", mean, z.shape[1]), ("data_spectrum", spectrum, cosines.bands)):
        if len(values) != count:
            raise ValueError(
                f"{argument(name)} must have {count} numbers for samples of the shape {tuple(z.shape[1:])}, got "
                f"{len(values)}. Write **data_moments(data)."
            )
    deviation = (cosines.spread(z.new_tensor(spectrum)[None]) + sigma**2).sqrt()
    return z.new_tensor(mean).view(-1, *[1] * (z.ndim - 2)) + cosines.inverse(deviation * cosines.transform(z))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
