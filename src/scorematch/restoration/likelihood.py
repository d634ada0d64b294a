r"""Draws from the likelihood of an observation times a normal distribution.

For a center c and a deviation r the density of :math:`x_0` is proportional to

.. math:: \exp\Bigl( -\Phi(x_0) - \frac{\lVert x_0 - c \rVert^2}{2 r^2} \Bigr), \qquad
          \Phi(x_0) = \tfrac12 (y - A(x_0))^\top (\Sigma_y + \tau I)^{-1} (y - A(x_0)) .

For a linear operator with known singular vectors, :math:`A = U S V^\top`, and noise that is independent along U, this
is a normal distribution for :math:`\tau = 0`, and with a standard normal z a draw is

.. math:: x_0 = c + r z + V \Bigl( \frac{r^2 S}{\Sigma_y + r^2 S^2}\, U^\top (y - A c)
                + r \Bigl( \frac{\Sigma_y^{1/2}}{(\Sigma_y + r^2 S^2)^{1/2}} - 1 \Bigr) V^\top z \Bigr) .

Other draws are made by Hamiltonian Monte Carlo. In :math:`q = (x_0 - c) / r` a leap of the angle :math:`\epsilon`
changes q and a normal momentum p by

.. math:: p \leftarrow p - \tfrac{\epsilon}{2} \nabla_q \Phi, \qquad
          (q, p) \leftarrow (q \cos \epsilon + p \sin \epsilon,\; p \cos \epsilon - q \sin \epsilon), \qquad
          p \leftarrow p - \tfrac{\epsilon}{2} \nabla_q \Phi .

The rotation is exact for the normal distribution, so that only :math:`\Phi` limits the angle. A proposal consists of
four leaps, and is accepted with the probability :math:`\min(1, e^{H - H'})`, where
:math:`H = \Phi + (\lVert q \rVert^2 + \lVert p \rVert^2) / 2`. Each sample is accepted on its own, and has an angle of
its own, which grows with every accepted proposal and shrinks with every rejected one, until about 70 % are accepted.

The variance :math:`\tau = L r^2 (r^2 / 2 v + 0.01)`, with the largest curvature L of
:math:`\lVert A(x_0) \rVert^2 / 2` and the variance v of the data, limits the ratio of the curvatures of both factors
while r is large, so that a chain can cross from one mode of the likelihood to another. It falls with the fourth power
of r. If only the product with the inverse of :math:`\Sigma_y` is known, it is divided by :math:`1 + \tau` instead, and
L is the largest curvature of :math:`\Phi` without that division.

A measurement without a gradient, such as JPEG or rounding, is replaced by its linearization at c, with the derivative
of ``Operator.linearized``: its jumps would stop the chain.

References:
    Neal, 2011, MCMC Using Hamiltonian Dynamics, arXiv:1206.1901.
    Beskos et al., 2011, Hybrid Monte Carlo on Hilbert Spaces (the rotation).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from scorematch.core.batches import per_image
from scorematch.core.randomness import standard_normal
from scorematch.core.scores import Score
from scorematch.restoration.decomposition import Decomposition
from scorematch.restoration.method import Restoration, largest_eigenvalue
from scorematch.restoration.observation import Observation
from scorematch.restoration.operator import Linearization
from scorematch.restoration.replacement import replacement

_LEAPS = 4
_LARGER, _SMALLER = 1.1, 0.8  # factors of the angle after a proposal
_PROBES = 4  # places for the largest curvature


class Likelihood(Restoration):
    """The likelihood of y, from which a sampler draws.

    Args:
        observation: an observation of known shape, with any operator.
        variance: v, the variance of the data.
        middle: the mean of the data, around which L is estimated.
    """

    def __init__(self, observation: Observation, variance: float, middle: float | Tensor) -> None:
        self._observation, self._variance = observation, variance
        operator = observation.operator
        self._exact = Restoration()
        if operator.gain is not None and not callable(observation.sigma):
            self._exact = replacement(observation, operator.gain)
        places, self._curvature = torch.Generator().manual_seed(0), observation.y.new_tensor(0.0)
        like = observation.y.new_zeros((1, *(observation.shape or ())))
        known = not callable(observation.sigma) and len(operator) == 1
        self._singular = operator.decomposition(like) if known else None
        if self._singular and self._singular.measured and not isinstance(observation.sigma, float):
            self._singular = None  # the noise is not independent along the singular vectors
        if self._singular is not None:
            return  # what follows is for Monte Carlo
        with torch.enable_grad():
            value = operator.measure(like.expand(len(observation), *like.shape[1:]).clone().requires_grad_())
        self._linearizes = operator.is_linear or not value.requires_grad
        for _ in range(_PROBES):
            u = standard_normal(like.shape, places, like.device).expand(len(observation), *like.shape[1:])
            near = operator.linearized(middle + variance**0.5 * u)
            self._curvature = torch.maximum(self._curvature, largest_eigenvalue(partial(self._curved, near), u))

    def _curved(self, near: Linearization, u: Tensor) -> Tensor:
        """The product with A'^T A', or with the inverse of the covariance between them if only that is known."""
        measured = self._observation.observed(near.forward(u))
        known = not callable(self._observation.sigma)
        return near.adjoint(measured if known else self._observation.precision(measured))

    def draw(
        self,
        x: Tensor,
        center: Tensor,
        deviation: float,
        angle: Tensor,
        count: int,
        noise: Callable[[Tensor], Tensor],
        uniform: Callable[[], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Samples of the product, and the new angles.

        If the product is a known normal distribution, the samples are independent of ``x``; otherwise they are those
        after ``count`` proposals.

        Args:
            x: where the chains are (n, ...), such as a draw for another center.
            center: c (n, ...).
            deviation: r.
            angle: the largest angle of a leap for each sample (n,).
            count: the number of proposals.
            noise: returns standard normal values like a tensor.
            uniform: returns a uniform random number for each sample (n,).
        """
        if self._singular is not None:
            z = noise(center)
            return center + deviation * (
                z + self._change(self._singular, self._observation, center, deviation, z)
            ), angle
        variance = deviation**2
        added = self._curvature * variance * (variance / (2 * self._variance) + 0.01)  # tau
        fixed = self._observation.operator.linearized(center) if self._linearizes else None

        def phi(q: Tensor) -> tuple[Tensor, Tensor]:
            place = center + deviation * q
            near = self._observation.operator.linearized(place) if fixed is None else fixed
            value = near.value if fixed is None else fixed.value + fixed.forward(deviation * q)
            return self._phi(near, value, added, deviation)

        q, each = (x - center) / deviation, (-1, *[1] * (x.ndim - 1))
        energy, force = phi(q)
        for _ in range(count):
            p, leap = noise(q), (angle * (1 + uniform()) / 2).view(each)
            moved, pull = q, force
            before = energy + (_square(q) + _square(p)) / 2
            for _ in range(_LEAPS):
                p = p + leap / 2 * pull
                moved, p = moved * leap.cos() + p * leap.sin(), p * leap.cos() - moved * leap.sin()
                potential, pull = phi(moved)
                p = p + leap / 2 * pull
            after = potential + (_square(moved) + _square(p)) / 2
            accepted = uniform().log() < before - after  # False for NaN
            angle = torch.where(accepted, angle * _LARGER, angle * _SMALLER).clamp(max=1.0)
            energy = torch.where(accepted, potential, energy)
            q, force = (torch.where(accepted.view(each), *pair) for pair in ((moved, q), (pull, force)))
        return center + deviation * q, angle

    def score(self, score: Score, x: Tensor, sigma: Any, rows: slice) -> Tensor:
        """The score that corresponds to the mean of the product, if it is a known normal distribution.

        Otherwise it is that of the network. The sampler uses it for the final denoising only.
        """
        follow = super().score(score, x, sigma, rows)
        if self._singular is None:
            return follow
        deviation = sigma / (1 + sigma**2 / self._variance) ** 0.5
        center = x + sigma**2 * follow
        mean = center + deviation * self._change(self._singular, self._observation.rows(rows), center, deviation)
        return (mean - x) / sigma**2

    def _change(
        self, singular: Decomposition, observation: Observation, center: Tensor, deviation: Any, z: Tensor | None = None
    ) -> Tensor:
        """What is added to (c + r z) / r for a draw of the normal distribution, or to c / r for its mean (n, ...)."""
        residual, sigma = observation.residual(observation.operator.measure(center)), observation.sigma
        along, scale = residual, deviation * singular.values
        if singular.measured is None:
            scale = observation.observed(scale.expand_as(residual))
        else:
            along = singular.measured(residual)
        noise = sigma if isinstance(sigma, Tensor) else scale.new_full((), cast(float, sigma))
        total = torch.hypot(noise, scale)
        change = scale / total * (along / total)
        if z is not None:
            change = change + (noise / total - 1) * singular.coefficients(z)
        return singular.sample(torch.where(scale > 0, change, 0))

    def _phi(self, near: Linearization, value: Tensor, added: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
        """Phi (n,) and its negative gradient in q."""
        observation = self._observation
        residual = observation.residual(value)
        extra = per_image(added.expand(len(residual)), residual)
        if callable(observation.sigma):
            weighted = observation.precision(residual) / (1 + extra)
        else:
            weighted = observation.observed(residual / (observation.sigma**2 + extra))
        return (residual * weighted).flatten(1).sum(1) / 2, deviation * near.adjoint(weighted)

    def finish(self, x: Tensor) -> Tensor:
        """As in ``Replacement`` if the operator has a gain; otherwise x unchanged."""
        return self._exact.finish(x)


def _square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)
