r"""Few steps for data whose covariance is known: a start at a moderate noise level, and steps exact for normal data.

Let the data have the mean :math:`\mu` and the covariance :math:`F^\top \operatorname{diag}(\lambda)\, F` in cosines.
If they were normal, the denoised image would be linear in each cosine. What remains is the residual R:

.. math:: F (D(x, \sigma) - \mu) = \frac{\lambda}{\lambda + \sigma^2}\, X + R(x, \sigma), \qquad X = F (x - \mu).

**Steps.** In :math:`u = -\log\sigma`, with :math:`k = 1 + \eta`, a step from :math:`\sigma` to :math:`\sigma'` of the
equation of ``scorematch.sampling.multistep`` solves the linear part exactly,

.. math:: X' = \rho^{k/2} X + k \int \Bigl(\frac{\lambda + \sigma'^2}{\lambda + e^{-2u}}\Bigr)^{k/2} R(u)\, du
          + \sqrt{(\lambda + \sigma'^2) (1 - \rho^\eta)}\; z,
          \qquad \rho = \frac{\lambda + \sigma'^2}{\lambda + \sigma^2},

and replaces only R by the polynomial through its last values, with the orders and the correction of "dpm-solver++" and
"unipc". For :math:`\lambda = 0` these are the steps of ``multistep``, whose linear part is that of data without
variance. Normal data are sampled exactly with any levels, and for images R changes less from step to step than D: with
four calls the difference from the exact path is half as large.

**Start.** At high levels R is small, so that a path may begin at a moderate level with

.. math:: x_\sigma = \mu + F^\top \sqrt{\lambda + \sigma^2}\; F z ,

the solution for normal data from noise z of the highest level. Noise alone, :math:`\mu + \sigma z`, would lack the
variance of the coarse structure: the brightness of a CIFAR-10 image has a standard deviation of 6.9 along its cosine.

The numbers are those of samples of one shape, ``net.sample_shape``. For samples of other sides the standard deviations
are interpolated along the frequency per value, and the mean value of a channel keeps its own.

References:
    Wang & Vastola, 2024, The Unreasonable Effectiveness of Gaussian Score Approximation, arXiv:2412.09726, for the
    start.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.batches import check_data
from scorematch.core.cosines import Cosines
from scorematch.core.scores import Score, noise_ratios
from scorematch.sampling.multistep import Method, nodes_of, polynomials, quadrature

__all__ = ["data_moments"]

_PAST = 4  # as many residuals as the methods use
_MEAN_SIDE, _MEAN_VALUES = 8, 1000


class Moments(TypedDict):
    """The options of ``ODESampler`` that describe the normal distribution of the data."""

    data_mean: list[float]
    data_spectrum: list[float]


def data_moments(data: Tensor, mean_side: int | None = None, net: Score | None = None) -> Moments:
    """The mean and the spectrum of data, as options of ``ODESampler`` that start below the highest noise level.

    Args:
        data: samples of the data or of a network (N, C, ...), with N of at least 2; some thousand.
        mean_side: the number of values along each axis by which the mean is described; 1 is the mean of each channel.
            None is 8, which shows the shape of aligned faces, or fewer for short sides and for more than 1,000 numbers.
        net: the network, needed if its channels have different units (``net.units``): the moments are then those of
            x / r, where the noise of each channel is sigma r.

    Returns:
        ``data_mean``, the mean at so low a resolution, and ``data_spectrum``, the mean variance of the cosines in each
        band of frequencies: first the bands of the mean over the channels, then those of differences of channels.

    Raises:
        TypeError: if the data are no floating-point tensor.
        ValueError: if there are fewer than two samples, some are not finite, or ``mean_side`` is above a side.

    Example:
        >>> import torch
        >>> images = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0)) + 3
        >>> {name: [round(value) for value in values] for name, values in data_moments(images, mean_side=1).items()}
        {'data_mean': [3], 'data_spectrum': [1, 1, 1, 1, 1, 1, 1, 1]}
    """
    check_data(data, "data")
    if len(data) < 2 or not bool(data.isfinite().all()):
        shape = tuple(data.shape)
        raise ValueError(f"data must be two or more samples (N, C, ...) without NaN or infinity, got shape {shape}.")
    data = data.to(torch.promote_types(data.dtype, torch.float32))
    (channels, *sides), cosines = data.shape[1:], Cosines(data)
    if mean_side is None:
        few = (n for n in range(min([_MEAN_SIDE, *sides]), 1, -1) if channels * n ** len(sides) <= _MEAN_VALUES)
        mean_side = next(few, 1) if sides else 1
    if check_count("mean_side", mean_side) > min(sides, default=1):
        raise ValueError(
            f"mean_side must be at most {min(sides, default=1)} for samples of the shape {tuple(data.shape[1:])}."
        )
    data = data / noise_ratios(net, data)
    mean = _resized(data.mean(0, keepdim=True), [mean_side] * len(sides)).flatten()
    spectrum = cosines.means(cosines.transform(data).var(0)[None])[0]
    # The mean may be far larger than the deviation, such as that of pressures in Pa.
    return {"data_mean": _rounded(mean, 7), "data_spectrum": _rounded(spectrum, 4)}


class Normal:
    """The normal distribution of the data, for states of the shape of x (n, C, ...).

    Args:
        x: states.
        mean: the mean of each channel, or of a low resolution, as ``data_moments`` returns it.
        spectrum: the variances of the bands of ``Cosines``.
        measured: the shape (C, ...) of the samples with this spectrum; None: that of x.

    Attributes:
        variance: the mean variance of a value.
    """

    def __init__(
        self, x: Tensor, mean: Sequence[float], spectrum: Sequence[float], measured: Sequence[int] | None = None
    ) -> None:
        check_data(x)
        self._cosines = Cosines(x)
        channels, *sides = x.shape[1:]
        if measured is not None and tuple(measured) != (shape := tuple(x.shape[1:])):
            spectrum = _of_other_sides(spectrum, measured, shape)
        side = max(1, round((len(mean) / channels) ** (1 / max(1, len(sides)))))
        counts = channels * side ** len(sides), self._cosines.bands
        for name, values, count in zip(("data_mean", "data_spectrum"), (mean, spectrum), counts, strict=True):
            if len(values) != count:
                raise ValueError(
                    f"{argument(name)} must have {count} numbers for samples of the shape {tuple(x.shape[1:])}, got "
                    f"{len(values)}. Write **data_moments(data), or leave out the moments that are stored with a "
                    "network by choosing the levels, such as ODESampler(net, levels=18)."
                )
        low = torch.tensor(mean, dtype=torch.float32, device="cpu").view(1, channels, *[side] * len(sides))
        self._mean = _resized(low, sides).to(x)
        self._spectrum = np.array(spectrum)
        self.variance = float(self._cosines.spread(self._to_device(self._spectrum[None])).mean())

    def start(self, z: Tensor, sigma: float) -> Tensor:
        """The states at the level sigma from standard normal noise z."""
        deviation = self._to_device(np.sqrt(self._spectrum + sigma**2)[None])
        return self._inverse(self._cosines.spread(deviation) * self._cosines.transform(z))

    def multistep(
        self,
        x: Tensor,
        chain: Callable[[Tensor, float], tuple[Tensor, Tensor, Tensor]],
        method: Method,
        sigmas: Sequence[float],
        order: int,
        etas: Sequence[float],
    ) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each step, with its level, as ``multistep`` does."""
        steps = list(self._plan(method, sigmas, order, etas))
        if not steps:  # of one level
            return
        numbers = self._to_device(np.concatenate([step.numbers for step in steps]))  # one copy, for which it waits
        rows = numbers.split([len(step.numbers) for step in steps])
        state, past = self._transform(x), deque[Tensor](maxlen=_PAST)
        for step, bands in zip(steps, rows, strict=True):
            x, score, z = chain(x, step.sigma)
            linear, kept, added, *gains = self._cosines.spread(bands)
            past.appendleft(self._transform(torch.add(x, score, alpha=step.sigma**2)) - linear * state)
            state = kept * state
            for gain, residual in zip(gains, past, strict=False):
                state = state + gain * residual
            if step.noisy:
                state = state + added * self._cosines.transform(z)
            x = self._inverse(state)
            yield x, step.sigma_next

    def _plan(self, method: Method, sigmas: Sequence[float], order: int, etas: Sequence[float]) -> Iterator[_Step]:
        places = [-math.log(sigma) for sigma in sigmas]
        correction: Sequence[np.ndarray] = []  # of the last step, for its residuals from the new one back
        for i, eta in enumerate(etas):
            nodes, (begin, end) = nodes_of(method, places, order, i), places[i : i + 2]
            before, after = (self._spectrum + sigma**2 for sigma in sigmas[i : i + 2])
            kept = (after / before) ** ((1 + eta) / 2)
            predicted = self._gains(nodes, begin, end, 1 + eta)
            gains = [
                first + kept * second
                for first, second in itertools.zip_longest(predicted, correction, fillvalue=np.zeros_like(kept))
            ]
            added = np.sqrt(after * (1 - (after / before) ** eta))
            numbers = np.array([self._spectrum / before, kept, added, *gains])
            yield _Step(sigmas[i], sigmas[i + 1], eta > 0, numbers)
            if method.corrected:
                corrected = self._gains([end, *nodes], begin, end, 1 + eta)
                correction = [corrected[0], *(new - old for new, old in zip(corrected[1:], predicted, strict=True))]

    def _gains(self, nodes: Sequence[float], begin: float, end: float, k: float) -> Sequence[np.ndarray]:
        """The factor (bands,) of the residual of each node in a step."""
        u, shares = quadrature(begin, end)
        total = self._spectrum[:, None] + np.exp(-2 * u)
        kernel = k * shares * ((self._spectrum[:, None] + math.exp(-2 * end)) / total) ** (k / 2)
        return [kernel @ values for values in polynomials(nodes, u)]

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(self._mean)  # without float64 on the device

    def _transform(self, x: Tensor) -> Tensor:
        return self._cosines.transform(x - self._mean)

    def _inverse(self, state: Tensor) -> Tensor:
        return self._mean + self._cosines.inverse(state)


class _Step(NamedTuple):
    """A step: its levels, whether it adds noise, and its numbers (rows, bands).

    The rows are the factors of the state in the linear part of D and in the next state, that of the noise, and those of
    the residuals from the last one back.
    """

    sigma: float
    sigma_next: float
    noisy: bool
    numbers: np.ndarray


def _resized(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Samples (n, C, ...) with other sides and the same lowest cosines."""
    result = x.new_zeros(*x.shape[:2], *sides)
    common: Any = (..., *(slice(min(a, b)) for a, b in zip(x.shape[2:], sides, strict=True)))
    result[common] = Cosines(x).transform(x)[common]
    return Cosines(result).inverse(result) * math.sqrt(result[0].numel() / x[0].numel())


def _of_other_sides(spectrum: Sequence[float], measured: Sequence[int], shape: Sequence[int]) -> Sequence[float]:
    """The spectrum for other sides: equal at equal frequencies per value, with the same deviation of the mean value."""
    if len(measured) != len(shape) or measured[0] != shape[0] or len(spectrum) != _cosines(measured).bands:
        return spectrum
    deviations = np.sqrt(spectrum).reshape(shape[0], -1)
    deviations[:, 0] *= math.sqrt(math.prod(shape) / math.prod(measured))
    known, wanted = _frequencies(measured), _frequencies(shape)
    return np.concatenate([np.interp(wanted, known, row) ** 2 for row in deviations]).tolist()


def _frequencies(shape: Sequence[int]) -> np.ndarray:
    """The frequencies of the bands of a channel, in half periods per value."""
    cosines = _cosines((1, *shape[1:]))
    return cosines.means(cosines.frequency[None])[0].numpy() / max(shape[1:])


def _cosines(shape: Sequence[int]) -> Cosines:
    return Cosines(torch.empty(0, *shape, dtype=torch.float64, device="cpu"))


def _rounded(values: Tensor, digits: int) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values.tolist()]
