"""Draws from a posterior in numbers and as a picture: mean, standard deviation and intervals of each value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scorematch.data.heat import heat_map
from scorematch.restoration.operator import kind_of

__all__ = ["Summary", "summary"]


class Summary(NamedTuple):
    """What draws from a posterior say about each value of the sample.

    Attributes:
        mean: their mean (...), the estimate with the smallest mean square error.
        deviation: their standard deviation (...), which says how far the truth may be from the mean.
        quantiles: their quantiles (Q, ...).
        levels: the levels of the quantiles.
    """

    mean: Tensor
    deviation: Tensor
    quantiles: Tensor
    levels: tuple[float, ...]

    def deviation_map(self) -> Tensor:
        """A picture (3, H', W') in [0, 1] of the deviations of an image, in colors and with their scale.

        Each value is the root of the mean over the channels of the squared deviation. Each pixel of the image becomes a
        square, so that the shorter side of the picture has at least 256 pixels.

        Raises:
            ValueError: if the draws are not images (K, C, H, W).
        """
        if self.deviation.ndim != 3:
            raise ValueError(
                f"a map needs draws of an image, (K, C, H, W), got draws of shape (K, "
                f"{', '.join(map(str, self.deviation.shape))}). Plot the deviation itself."
            )
        return heat_map(self.deviation.square().mean(0).sqrt())

    def errors(self, truth: Tensor, where: Tensor | None = None) -> tuple[float, float]:
        """The root mean squares of the error of the mean and of the deviation, which are about equal for exact draws.

        Args:
            truth: the sample (...).
            where: the values that count, bool, broadcastable to the sample; None for all.
        """
        kept = torch.ones_like(self.mean) if where is None else where.expand_as(self.mean).to(self.mean)
        squares = (self.mean - truth).square(), self.deviation.square()
        error, deviation = (float(((each * kept).sum() / kept.sum()).sqrt()) for each in squares)
        return error, deviation


def summary(draws: Tensor, levels: Sequence[float] = (0.05, 0.5, 0.95)) -> Summary:
    """The mean, the standard deviation and quantiles of draws of one sample.

    The quantile of level p is the p (K + 1)-th smallest of K draws, by linear interpolation. If the draws are exact,
    the interval between the quantiles of levels 0.05 and 0.95 therefore contains the truth with a probability of 90 %.
    With fewer than 19 draws the interval is that from the smallest to the largest draw, whose probability is
    (K - 1) / (K + 1).

    Args:
        draws: (K, ...), floating point, K at least 2, such as ``sampler.sample(20, observation=observation)`` for an
            observation of one sample.
        levels: the levels of the quantiles, each from 0 to 1.

    Raises:
        TypeError: if the draws are not a floating-point tensor.
        ValueError: if there are fewer than 2 draws, or a level is out of range.

    Example:
        >>> found = summary(torch.arange(21.0)[:, None])
        >>> found.mean, found.quantiles
        (tensor([10.]), tensor([[ 0.1000],
                [10.0000],
                [19.9000]]))
        >>> found.errors(torch.tensor([13.0]))
        (3.0, 6.204836845397949)
    """
    if not isinstance(draws, Tensor) or not draws.is_floating_point():
        raise TypeError(f"draws must be a floating-point tensor (K, ...), got {kind_of(draws)}.")
    if draws.ndim < 2 or len(draws) < 2:
        raise ValueError(f"draws must be (K, ...) with at least 2 draws of one sample, got shape {tuple(draws.shape)}.")
    if not all(0 <= level <= 1 for level in levels):
        raise ValueError(f"levels must be from 0 to 1, got {list(levels)}.")
    ordered = draws.sort(0).values
    place = (torch.tensor(levels, dtype=torch.float64, device="cpu") * (len(draws) + 1) - 1).clamp(0, len(draws) - 1)
    below = place.long().clamp(max=len(draws) - 2)
    weight = (place - below).to(ordered).view(-1, *[1] * (draws.ndim - 1))
    below = below.to(draws.device)
    quantiles = torch.lerp(ordered[below], ordered[below + 1], weight)
    return Summary(draws.mean(0), draws.std(0), quantiles, tuple(levels))
