r"""Moment matching without derivatives of the network: the state is shifted until its denoised image agrees with y.

The notation is that of ``scorematch.restoration.method``, with the Jacobian A of the operator at D. Bayes' rule turns a
factor :math:`e^{w \cdot x_0 / \sigma^2}` of the density of :math:`x_0` given x into a shift of x: the product is the
density of :math:`x_0` given :math:`x + w`, up to a constant. Its mean is :math:`D(x + w)`, without a derivative of the
network. For Gaussian data and a linear operator this is the posterior mean of :math:`x_0` given x and y if

.. math:: w = \sigma^2 A^\top v, \qquad A\, D(x + \sigma^2 A^\top v) + \Sigma_y v = y ,

where :math:`\Sigma_y` is the covariance of the noise of y. The equation is solved along with the chain: each call of
the network is one step of a quasi-Newton method, which begins with the v of the step before,

.. math:: e = y - A(D(x + w)) - \Sigma_y v, \qquad
          \hat D = D(x + w) + C A^\top (\Sigma_y + A C A^\top)^{-1} e, \qquad
          v \leftarrow v + (\Sigma_y + A C_\lambda A^\top)^{-1} (e - \lambda \sigma^2 A A^\top v) .

C is the estimate of the covariance of :math:`x_0` given x of ``scorematch.restoration.cosine``. It is learned from the
change of D between two calls, after the part that is due to the change of the level: for Gaussian data with the mean m,
:math:`D - m` is :math:`(C / \sigma^2) (x - m)`. The first denoised image stands for m. The linear systems are solved by
conjugate gradients, without calls of the network. The constant :math:`\lambda = 0.02`, with
:math:`C_\lambda = C + \lambda \sigma^2 I`, adds :math:`\lambda \sigma^2` to the variance of the noise of the observed
part. Without it, w would grow without limit in the directions in which data vary much less than :math:`\sigma`, and the
network would see states that it was not trained on.

SNIPS and DDRM replace the observed part of the state by y with noise, which says less about the hidden part than y; the
shifted state has no such noise.

References:
    Kawar et al., 2021, SNIPS, arXiv:2105.14951.
    Kawar et al., 2022, Denoising Diffusion Restoration Models (DDRM), arXiv:2201.11793.
    Efron, 2011, Tweedie's Formula and Selection Bias (the density given x is an exponential family in x).
    Rozet et al., 2024, arXiv:2405.13712 (moment matching).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from scorematch.core.scores import Score, score_at
from scorematch.restoration.cosine import CosineCovariance
from scorematch.restoration.method import Restoration
from scorematch.restoration.moments import System, exactly
from scorematch.restoration.observation import Observation

_DAMPING = 0.02  # lambda: with 0.005 the draws of digits were too much alike
_INNER, _INNER_TOLERANCE = 8, 0.1  # iterations of each linear system, and their relative residual


class _Step(NamedTuple):
    """The last step: the shifted state, its denoised image, and the next v with A^T v."""

    shifted: Tensor
    denoised: Tensor
    v: Tensor
    change: Tensor


class Shift(Restoration):
    """Shifts the state until the measurement of its denoised image agrees with y.

    Args:
        observation: an observation with any operator.
        variance: the variance of the data, for the first estimate of their covariance.
    """

    def __init__(self, observation: Observation, variance: float) -> None:
        self._observation, self._variance = observation, variance
        self._covariances: dict[int, CosineCovariance] = {}  # by the first row of a batch
        self._means: dict[int, Tensor] = {}
        self._steps: dict[int, _Step] = {}

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that corresponds to the mean of x0 given x and y."""
        observation, level, last = self._observation.rows(rows), sigma**2, self._steps.get(rows.start)
        change = torch.zeros_like(x) if last is None else last.change
        shifted = x + level * change
        follow = score_at(score, shifted, sigma, None)
        denoised = shifted + level * follow
        near = observation.operator.linearized(denoised)
        system, residual = System(observation, near), observation.residual(near.value)
        covariance = self._covariances.setdefault(rows.start, CosineCovariance(x, self._variance))
        if last is None:
            covariance.at(level)
            self._means[rows.start] = denoised
            v = torch.zeros_like(residual)
        else:
            mean, v = self._means[rows.start], last.v
            before = mean + covariance.transfer(last.denoised - mean, level)
            covariance.learn(shifted - last.shifted, denoised - before)
        error, damping = residual - system.noise(v), _DAMPING * level
        pull = damping * observation.observed(near.forward(near.adjoint(system.weighted(v))))
        step = system.solve(covariance.product, error, _INNER, _INNER_TOLERANCE)
        damped = system.solve(lambda u: covariance.product(u) + damping * u, error - pull, _INNER, _INNER_TOLERANCE)
        self._steps[rows.start] = _Step(shifted, denoised, v + damped, near.adjoint(system.weighted(v + damped)))
        return follow + change + covariance.product(near.adjoint(system.weighted(step))) / level

    def finish(self, x: Tensor) -> Tensor:
        """The result meets the values of y without noise if the operator is linear; otherwise it is unchanged."""
        return exactly(self._observation, x)
