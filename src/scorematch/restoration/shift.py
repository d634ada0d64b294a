r"""Moment matching without derivatives of the network: the state is shifted until its denoised image agrees with y.

The notation is that of ``scorematch.restoration.method``, with the Jacobian A of the operator at D. Bayes' rule turns a
factor :math:`e^{w \cdot x_0 / \sigma^2}` of the density of :math:`x_0` given x into a shift of x: the product is the
density of :math:`x_0` given :math:`x + w`, up to a constant. Its mean is :math:`D(x + w)`, without a derivative of the
network. For Gaussian data and a linear operator this is the posterior mean of :math:`x_0` given x and y if

.. math:: w = \sigma^2 A^\top v, \qquad A\, D(x + \sigma^2 A^\top v) + \Sigma_y v = y ,

where :math:`\Sigma_y` is the covariance of the noise of y. The equation is solved along with the chain: each call of
the network is one step of a quasi-Newton method, which begins with the w and v of the step before,

.. math:: (\Sigma_y + A C A^\top)\, v = y - A \bigl( D(x + w) - C w / \sigma^2 \bigr), \qquad
          \hat D = D(x + w) + C (A^\top v - w / \sigma^2), \qquad
          w \leftarrow \sigma^2\, C (C + \lambda \sigma^2 I)^{-1} A^\top v .

C is the estimate of the covariance of :math:`x_0` given x of ``scorematch.restoration.cosine``. If C is exact,
:math:`\hat D` is the posterior mean for every w; if :math:`w = \sigma^2 A^\top v`, it is :math:`D(x + w)` for every C.
The linear system is solved by conjugate gradients, without calls of the network; its right-hand side is projected onto
the range of A if the operator is not linear. Without the damping :math:`\lambda`, w would grow without limit in the
directions in which data vary much less than :math:`\sigma`, and the network would see states that it does not know.

For Gaussian data with the covariance :math:`C_0` and the mean m, :math:`C_0^{-1} (D - m) = -s` at every level, where s
is the score. Let q and p be the changes of D and of -s from one call to the next, and :math:`q'` and :math:`p'` those
at the call before. Then :math:`C_0^{-1} q = p`, from which C is learned: :math:`C (q + \sigma^2 p) = \sigma^2 q` at
every level. It follows that :math:`q \cdot p' = p \cdot q'`, and the damping depends on the deviation from that,

.. math:: \lambda = \min(0.02,\; 10\, b^2), \qquad
          b \leftarrow \frac12 \Bigl( b + \frac{|q \cdot p' - p \cdot q'|}{|q \cdot p'| + |p \cdot q'|} \Bigr),

with 1 in place of the fraction if :math:`q \cdot p` is not positive. :math:`\lambda` is at least :math:`10^{-4}`. The
score of Gaussian data needs no damping; with a network :math:`\lambda` is 0.02 at nearly all levels.

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
from scorematch.restoration.moments import System, consistent, exactly, explained
from scorematch.restoration.observation import Observation

_DAMPING = 0.02  # the largest lambda: with 0.005, w of digits grew to 14 sigma, and the draws were too much alike
_LEAST = 1e-4  # the smallest one


class _Step(NamedTuple):
    """The last call of the network, and what it leaves for the next one."""

    denoised: Tensor
    score: Tensor
    v: Tensor
    shift: Tensor  # w / sigma^2
    changes: tuple[Tensor, Tensor] | None  # q and p
    bend: Tensor  # b (n,)


class Shift(Restoration):
    """Shifts the state until the measurement of its denoised image agrees with y.

    Args:
        observation: an observation with any operator.
        variance: the variance of the data, for the first estimate of their covariance.
    """

    def __init__(self, observation: Observation, variance: float) -> None:
        self._observation, self._variance = consistent(observation), variance
        self._covariances: dict[int, CosineCovariance] = {}  # by the first row of a batch
        self._steps: dict[int, _Step] = {}

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that corresponds to the mean of x0 given x and y."""
        observation, level, last = self._observation.rows(rows), sigma**2, self._steps.get(rows.start)
        shift = torch.zeros_like(x) if last is None else last.shift
        shifted = x + level * shift
        follow = score_at(score, shifted, sigma, None)
        denoised = shifted + level * follow
        near = observation.operator.linearized(denoised)
        system, residual = System(observation, near), observation.residual(near.value)
        if rows.start not in self._covariances:
            self._covariances[rows.start] = CosineCovariance(x, self._variance)
        covariance = self._covariances[rows.start]
        covariance.at(level)
        v, changes, bend = torch.zeros_like(residual), None, x.new_ones(len(x))
        if last is not None:
            q, p = changes = denoised - last.denoised, last.score - follow
            covariance.learn(q + level * p, q)
            v, bend = last.v, last.bend if last.changes is None else (last.bend + _bend(changes, last.changes)) / 2
        error = residual - system.noise(v)
        missing = shift - near.adjoint(system.weighted(v))
        error = error + observation.observed(near.forward(covariance.product(missing)))
        v = v + system.solve(covariance.product, explained(observation, near, error))
        back = near.adjoint(system.weighted(v))
        damped = covariance.damped(back, (10 * bend.square()).clamp(_LEAST, _DAMPING) * level)
        self._steps[rows.start] = _Step(denoised, follow, v, damped, changes, bend)
        return follow + shift + covariance.product(back - shift) / level

    def finish(self, x: Tensor) -> Tensor:
        """The result meets the values of y without noise if the operator is linear; otherwise it is unchanged."""
        return exactly(self._observation, x)


def _bend(changes: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> Tensor:
    """How far a score is from linear, (n,) from 0 to 1; the changes are q and p of two calls."""
    (q, p), (q_before, p_before) = changes, before
    one, other = _dot(q, p_before), _dot(p, q_before)
    found = (one - other).abs() / (one.abs() + other.abs())
    return torch.where(_dot(q, p) > 0, found, 1.0).nan_to_num(1.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)
