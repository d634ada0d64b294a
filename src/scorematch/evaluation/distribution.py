"""The base class of distributions whose score, density and samples are known."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scorematch.core.batches import as_sigma, check_data
from scorematch.core.randomness import single_generator
from scorematch.evaluation.rows import double
from scorematch.noise import NoiseSchedule

__all__ = ["Distribution"]


class Distribution(ABC):
    """A distribution whose score, density and samples are known; as a callable it is its own score.

    Args:
        sample_shape: the shape of one sample, with D values.
        schedule: the noise levels with which samplers use the distribution; None for no default.
        value_range: the range of the data, (low, high), to which samplers clamp unless ``clamp`` is False; None for
            data without a range.

    Attributes:
        sample_shape, schedule, value_range: the arguments.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        schedule: NoiseSchedule | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.sample_shape = tuple(sample_shape)
        self.schedule = schedule
        self.value_range = value_range

    @property
    def _attributes(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sample_shape", "schedule", "value_range")}

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean (D,), float64."""

    @property
    @abstractmethod
    def covariance(self) -> Tensor:
        """The covariance (D, D), float64."""

    @property
    def data_std(self) -> float:
        """The root of the mean variance of the values, which restoration methods use."""
        return math.sqrt(float(self.covariance.diagonal().mean()))

    def sample(
        self, n: int, generator: torch.Generator | int | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Draws n samples (n, ...).

        Args:
            n: the number of samples.
            generator: the source of the random numbers: a ``torch.Generator``, or a seed; None is torch's global
                generator.
            dtype: the dtype of the samples.
        """
        return self._sample(n, single_generator(generator)).view(n, *self.sample_shape).to(dtype)

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """The score of x (N, ...) with noise of level sigma, a float, () or (N,)."""
        flat, level = self._flat(x), as_sigma(sigma, x).to(self.mean.device).double()
        return self._score(flat, level.view(-1, 1).square()).view(x.shape).to(x)

    def definition(self) -> list[Any]:
        """Everything that determines the score, as for ``NetworkScore``.

        These are the public attributes; a subclass with other values in private attributes adds them.
        """
        return [{key: value for key, value in vars(self).items() if key[0] != "_"}]

    def log_density(self, x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
        """The log-density (N,) of the distribution with noise of level sigma, in nats, at x (N, ...).

        The level is a float, () or (N,), positive, or the number 0 for no noise.

        Raises:
            TypeError: if x is not a floating-point tensor.
            ValueError: if x or sigma has another shape, sigma is negative, or it is too low for a density: a
                distribution that does not vary in some direction, such as a data set, has none without noise.
        """
        flat = self._flat(x)
        noisy = isinstance(sigma, Tensor) or sigma != 0
        level = as_sigma(sigma, flat) if noisy else flat.new_zeros(())
        return self._log_density(flat, level.view(-1, 1).square()).to(x)

    def _flat(self, x: Tensor) -> Tensor:
        check_data(x)
        if x.shape[1:] != self.sample_shape:
            expected = ", ".join(map(str, ("N", *self.sample_shape)))
            raise ValueError(f"x must be ({expected}), got shape {tuple(x.shape)}.")
        return double(x).to(self.mean.device).flatten(1)

    @abstractmethod
    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Samples (n, D)."""

    @abstractmethod
    def _score(self, x: Tensor, variance: Tensor) -> Tensor:
        """The score of x (N, D) with noise of the variance (N, 1) or (1, 1)."""

    @abstractmethod
    def _log_density(self, x: Tensor, variance: Tensor) -> Tensor:
        """The log-density (N,) of x (N, D) with noise of the variance (N, 1) or (1, 1)."""
