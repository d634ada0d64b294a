r"""The twisting function of a particle sampler: the likelihood of y given the state at a noise level.

At the level :math:`\sigma` the sample :math:`x_0` is taken to be distributed as :math:`\mathcal{N}(D, r^2 I)` given the
state x, where D is the denoised image, :math:`r^2 = \sigma^2 v / (\sigma^2 + v)`, and v is the variance of the data.
Then

.. math:: \tilde p_\sigma(y \mid x) = \mathcal{N}\bigl(y;\; A(D),\; \Sigma_y + r^2 A A^\top\bigr) .

If the noise of y has one standard deviation, the covariance is diagonal along the singular vectors of a linear operator
(``Operator.decomposition``). If they are not known, or the noise differs between the values of y,
:math:`A A^\top` is replaced by a diagonal matrix: for an operator that is not linear, or has no gain, that of the mean
square change of A(x) for 64 random changes of a sample in the middle of the value range, relative to theirs. The
weights of the particles are correct with any such function; they vary less with a better one.

At the end the function is the likelihood of y given the sample. Where the variance of the noise of y is below
:math:`r^2 A A^\top` of the lowest level of the sampler, that variance takes its place.

References:
    Wu et al., 2023, Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (TDS),
    arXiv:2306.17775, Eq. 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scorematch.core.randomness import standard_normal
from scorematch.core.scores import Score
from scorematch.restoration.guide import Guidance
from scorematch.restoration.method import Restoration
from scorematch.restoration.observation import Observation

_PROBES = 64


class Twist(Restoration):
    """A method whose score proposes particles, with the likelihood that weighs them.

    Args:
        method: the method. One that changes the state in place of the score is replaced by "guide".
        observation: the observation; its shape is known.
        variance: v, the variance of the data.
        middle: the mean of the data, that of ``middle_of``.

    Raises:
        ValueError: if the noise of y is given as a function.
    """

    def __init__(self, method: Restoration, observation: Observation, variance: float, middle: float | Tensor) -> None:
        if callable(observation.sigma):
            raise ValueError(
                "particles are weighed with the variance of the noise of y: pass sigma as a number or as a tensor, got "
                f"a function in {observation!r}."
            )
        moves = type(method).score is Restoration.score
        self.method = Guidance(observation, variance, jacobian=False) if moves else method
        self._observation, self._variance = observation, variance
        operator, one = observation.operator, isinstance(observation.sigma, float)
        x = observation.y.new_zeros((len(operator), *(observation.shape or ()))) + middle
        known = operator.decomposition(x) if operator.gain is None and one and len(operator) == 1 else None
        self._along = None if known is None else known.measured  # the singular vectors, if not those of y
        if known is not None:
            self._spread = known.values.square()  # of A A^T along them
        else:
            gain = operator.gain
            self._spread = _spread(observation, variance, x) if gain is None else torch.tensor(gain, device=x.device)
        self._beside = -observation.log_unit()  # the log-density of what has no spread, in the units of y
        if self._along is not None and isinstance(observation.sigma, float) and observation.sigma > 0:
            self._beside = self._beside + _log_beside(observation, self._along, observation.sigma**2, self._spread > 0)

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score of the method."""
        return self.method.score(score, x, sigma, rows)

    def log_likelihood(self, x: Tensor, sigma: float, *, end: bool = False) -> Tensor:
        """The logarithm of the twisting function (n,) at the denoised images or, at the end, at the samples x (n, ...).

        Args:
            x: the denoised images, or the samples.
            sigma: the level; at the end, the lowest one.
            end: whether x are the samples.
        """
        observation = self._observation
        noise = torch.as_tensor(observation.sigma, device=x.device) ** 2
        spread = sigma**2 * self._variance / (sigma**2 + self._variance) * self._spread  # r^2 A A^T
        variance = torch.maximum(noise, spread) if end else noise + spread
        residual = observation.residual(observation.operator.measure(x))
        if self._along is None:
            seen = observation.observed(torch.ones_like(residual)) > 0
            return _log_normal(residual, variance, seen) + self._beside
        values = self._along(residual)
        return _log_normal(values, variance, (spread > 0).expand_as(values)) + self._beside


def _log_normal(values: Tensor, variance: Tensor, seen: Tensor) -> Tensor:
    """The logarithm of the normal density (n,) of the values that are seen; one without variance has none."""
    terms = values.square() / variance + (2 * math.pi * variance).log()
    return -torch.where(seen & (variance > 0), terms, 0).flatten(1).sum(1) / 2


def _log_beside(observation: Observation, along: Callable[[Tensor], Tensor], variance: float, seen: Tensor) -> Tensor:
    """The log-density (n,) of the part of y outside of the singular vectors, which is noise."""
    y = observation.residual(torch.zeros_like(observation.y))
    values = along(y)
    seen = seen.expand_as(values).flatten(1)
    count = observation.observed(torch.ones_like(y)).flatten(1).sum(1) - seen.sum(1)
    rest = y.square().flatten(1).sum(1) - (values.flatten(1).square() * seen).sum(1)
    return -(rest.clamp(min=0) / variance * (count > 0) + count * math.log(2 * math.pi * variance)) / 2


def _spread(observation: Observation, variance: float, x: Tensor) -> Tensor:
    """The mean square change of the measurement of x, divided by that of x, of the variance of the data."""
    operator, generator = observation.operator, torch.Generator().manual_seed(0)
    value, total = operator.measure(x), torch.zeros((), device=x.device)
    for _ in range(_PROBES):
        u = standard_normal(x.shape, generator, x.device)
        total = total + (operator.measure(x + variance**0.5 * u) - value).square()
    return total / (_PROBES * variance)
