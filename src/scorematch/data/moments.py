r"""The mean and the standard deviation of each channel of data, in one pass over batches in float64.

For a batch b with the count n_b, the mean m_b and the sum of squared deviations S_b, those of all data so far become

.. math:: m \leftarrow m + \frac{n_b}{n + n_b} (m_b - m), \qquad
          S \leftarrow S + S_b + \frac{n n_b}{n + n_b} (m_b - m)^2, \qquad n \leftarrow n + n_b .

References:
    Chan, Golub & LeVeque, 1983, Algorithms for Computing the Sample Variance, The American Statistician 37(3), 242-247.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.conditions import Condition, named_parts
from scorematch.data.array_data import check_finite
from scorematch.data.images import Data

_VALUES = 2**22  # in memory at once
_FARTHEST = 1e5  # the mean, in standard deviations: float32 rounds the values to 0.01 of one there
_LOW, _HIGH = 1e-12, 1e9  # of standard deviations; what restorations and losses compute is in float32


class Moments(NamedTuple):
    """The moments of each channel of data (N, C, ...), or of each value of vectors (N, D), float64 (C,).

    Attributes:
        mean: the mean.
        std: the standard deviation.
        low: the smallest value.
        high: the largest value.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor


class Sums:
    """The sums of the batches that were added: their number of values for each channel, mean, and squares around it."""

    def __init__(self, name: str, part: str, *, data: bool = False) -> None:
        self.name, self.part, self.data, self.first, self.n = name, part, data, 0, 0
        self.mean = self.squares = torch.zeros((), device="cpu")
        self.low, self.high = (torch.tensor(each, device="cpu") for each in (math.inf, -math.inf))

    def add(self, x: Tensor) -> None:
        """Adds samples (n, C, ...), which must be finite."""
        check_finite(x, self.name, self.first, data=self.data)
        values = x.detach().double().transpose(0, 1).flatten(1)
        n, mean, (low, high) = values.shape[1], values.mean(1), values.aminmax(dim=1)
        squares = (values - mean[:, None]).square().sum(1)
        share, shift = n / (self.n + n), mean - self.mean
        self.mean = self.mean + share * shift
        self.squares = self.squares + squares + share * self.n * shift.square()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.n, self.first = self.n + n, self.first + len(x)

    def moments(self) -> Moments:
        """The moments, if each channel can be standardized by them."""
        constant = self.low == self.high
        if bool(constant.any()):
            raise ValueError(
                f"{self.part} {int(constant.nonzero()[0])} of {self.name} is constant. Leave it out, or if it varies, "
                "but not in float32, take other units, such as x - x.mean()."
            )
        std = (self.squares / (self.n - 1)).sqrt()
        beyond = (std < _LOW) | (std > _HIGH)
        if bool(beyond.any()):
            i = int(beyond.nonzero()[0])
            raise ValueError(
                f"{self.part} {i} of {self.name} must have a standard deviation from {_LOW:g} to {_HIGH:g}, got "
                f"{float(std[i]):.3g}. Take other units, such as x / {float(std[i]):.0e}."
            )
        coarse = self.mean.abs() > _FARTHEST * std
        if bool(coarse.any()):
            i = int(coarse.nonzero()[0])
            raise ValueError(
                f"the mean of {self.part} {i} of {self.name} must be at most {_FARTHEST:g} standard deviations, got "
                f"{float(self.mean[i] / std[i]):.3g}: float32 rounds such values. Write x - x.mean(), in float64."
            )
        return Moments(self.mean, std, self.low, self.high)


def step_of(shape: Sequence[int]) -> int:
    """The number of samples of a shape that are in memory at once."""
    return max(1, _VALUES // math.prod(shape))


def batches_of(data: Data) -> Iterator[Tensor]:
    """All samples in their order, in batches (n, C, ...)."""
    return (data.read(rows)[0] for rows in torch.arange(len(data), device="cpu").split(step_of(data.shape)))


def moments(
    data: Data, *, takes: Condition | None = None, progress: bool = False
) -> tuple[Moments, dict[str, Moments]]:
    """Measures data, and the vectors and the images that are their conditions.

    Args:
        data: the data, floating point.
        takes: the condition that the network takes. One that an encoder takes is not measured.
        progress: whether to show a progress bar.

    Returns:
        The moments of the channels; and by name those of the values of vectors, "features", and of the channels of
        images, "image".

    Raises:
        ValueError: if the data have NaN or infinite values, or a channel or a value that is constant, or whose
            deviation is too small or too large for float32, or too small for its mean.
    """
    found = Sums("data", "channel", data=True)
    others = {"features": Sums("condition", "value"), "image": Sums("condition", "channel")}
    others = {} if takes is None else {part: others[part] for part in takes.parts() if part in others}
    if takes is not None and takes.encoder:
        others.pop("features")
    step = step_of(data.shape)
    for first in tqdm(range(0, len(data), step), "measuring", unit="batch", leave=False, disable=not progress, delay=2):
        x, condition = data.read(torch.arange(first, min(first + step, len(data)), device="cpu"))
        found.add(x)
        for part, given in named_parts(condition, takes).items():
            if part in others:
                others[part].add(given)
    return found.moments(), {part: each.moments() for part, each in others.items() if each.n}
