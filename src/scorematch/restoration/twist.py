r"""The twisting function of a particle sampler: the likelihood of y given the state at a noise level.

At the level :math:`\sigma` the sample :math:`x_0` is taken to be distributed as :math:`\mathcal{N}(D, r^2 I)` given the
state x, where D is the denoised image, :math:`r^2 = \sigma^2 v / (\sigma^2 + v)`, and v is the variance of the data.
Then

.. math:: \tilde p_\sigma(y \mid x) = \prod_i \mathcal{N}\bigl(y_i;\; A(D)_i,\; \sigma_i^2 + r^2 a_i\bigr),

with the noise :math:`\sigma_i` of y, and with :math:`a_i`, the variance of A(x) for samples of variance 1: the gain of
the operator, or else the mean over 64 random samples around the middle of the value range; for a linear operator an
estimate of the diagonal of :math:`A A^\top`. The weights of the particles are correct with any such function; they vary
less with a better one. At the end it is the likelihood of y given the sample. Only a value of y whose noise is below
that of the lowest level of the sampler has the variance :math:`r^2 a_i` of this level instead of its own.

References:
    Wu et al., 2023, Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (TDS),
    arXiv:2306.17775, Eq. 8.
"""

from __future__ import annotations

import math
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
        gain = observation.operator.gain
        self._spread = _spread(observation, variance, middle) if gain is None else gain

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
        spread = sigma**2 * self._variance / (sigma**2 + self._variance) * self._spread  # r^2 a
        variance = torch.maximum(noise, torch.as_tensor(spread, device=x.device)) if end else noise + spread
        residual = observation.residual(observation.operator.measure(x))
        terms = residual.square() / variance + (2 * math.pi * variance).log()
        # Without noise, a value that does not depend on x has no variance.
        terms = torch.where(variance > 0, observation.observed(terms), 0)
        return -terms.flatten(1).sum(1) / 2


def _spread(observation: Observation, variance: float, middle: float | Tensor) -> Tensor:
    """The mean square change of the measurement, divided by that of a sample with the variance of the data."""
    operator, generator = observation.operator, torch.Generator().manual_seed(0)
    x = observation.y.new_zeros((len(operator), *(observation.shape or ()))) + middle
    value, total = operator.measure(x), torch.zeros((), device=x.device)
    for _ in range(_PROBES):
        u = standard_normal(x.shape, generator, x.device)
        total = total + (operator.measure(x + variance**0.5 * u) - value).square()
    return total / (_PROBES * variance)
