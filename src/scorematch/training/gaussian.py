r"""A Gaussian fitted to measurements by expectation-maximization (EM): the first prior of ``train_from_observations``.

Item i is :math:`y_i = A_i x_i + n_i` with its own linear operator and noise of covariance :math:`\Sigma_i`, and
:math:`x_i \sim \mathcal{N}(m, C)`. Given y, the sample is normal with

.. math:: \mu_i = m + K_i (y_i - A_i m), \quad P_i = C - K_i A_i C, \quad
          K_i = C A_i^\top (A_i C A_i^\top + \Sigma_i)^{-1},

and an iteration replaces m by the mean of :math:`\mu_i`, and C by the mean of
:math:`P_i + (\mu_i - m)(\mu_i - m)^\top` with the new m. The likelihood of the measurements never decreases.

Up to 64 values per sample C is a full matrix, and the iteration is exact. For larger samples
:math:`C = W W^\top + \psi I` with a W of 64 columns, as in probabilistic principal component analysis, and draws from
the posteriors take the place of the exact moments. A draw is :math:`x + K_i (y_i - A_i x - n)` for an x from the prior
and noise n; the linear system is solved by conjugate gradients, with products of the operators only.

The channels may have different units. With several of them, the iteration works on u = x / s, where s are the standard
deviations of the channels in the measurements, and the identity above becomes :math:`\operatorname{diag}(s^2)`. All
computations are in float64 on the CPU.

References:
    Dempster, Laird & Rubin, 1977, Maximum Likelihood from Incomplete Data via the EM Algorithm.
    Tipping & Bishop, 1999, Probabilistic Principal Component Analysis (the maximum for given moments).
    Rozet et al., 2024, arXiv:2405.13712, Sec. 4 and App. C (a Gaussian of this form as the first prior).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scorematch.core.randomness import standard_normal
from scorematch.restoration.moments import conjugate_gradients
from scorematch.restoration.observation import Observation

_LARGEST = 64  # values of a sample for a full covariance
_ITERATIONS, _TOLERANCE = 1000, 1e-6  # of the exact iteration: until the gain of log-likelihood per item is smaller
_RANK, _ROUNDS, _ITEMS = 64, 16, 1024  # columns of W, iterations, and the most items that they use
_RESIDUAL = 1e-4  # of the linear systems, relative
_BLOCK = 1024  # items at a time
_LARGEST_MATRICES = 2**26  # values of all matrices together, 512 MiB, which limits the items of the exact iteration
_JITTER = 1e-10  # relative to the mean variance of a measured value, for a measurement without noise


class Gaussian(NamedTuple):
    """The normal distribution with the mean m and the covariance W W^T + psi diag(s^2).

    Attributes:
        shape: the shape of one sample, of D values.
        mean: m (D,), float64.
        factor: W (D, rank), float64.
        variance: psi.
        scale: s (D,), float64, the standard deviation of the channel of each value; 1 for one channel.
    """

    shape: tuple[int, ...]
    mean: Tensor
    factor: Tensor
    variance: float
    scale: Tensor | float = 1.0

    @property
    def scale_of_sample(self) -> Tensor | float:
        """The numbers s in the shape of a sample."""
        return self.scale.view(self.shape) if isinstance(self.scale, Tensor) else self.scale

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), float64."""
        return self.factor @ self.factor.T + self.variance * torch.eye(len(self.mean)).double() * self.scale**2

    @property
    def variances(self) -> Tensor:
        """The variance of each value (D,), float64."""
        return self.factor.square().sum(1) + self.variance * self.scale**2

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n samples (n, ...), float64."""
        z, e = (
            standard_normal((n, size), generator, self.mean.device, torch.float64) for size in self.factor.shape[::-1]
        )
        return (self.mean + z @ self.factor.T + self.variance**0.5 * self.scale * e).view(n, *self.shape)

    def draw(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Draws from the posterior of each item of a linear observation, (N, ...), float64."""
        x, scale = self.sample(len(observation), generator), self.scale_of_sample
        observation = observation.scaled(scale)
        operator, y, w = observation.operator, observation.y.double(), (self.factor.T / self.scale).T
        sigma = observation.covariance(torch.ones_like(y)).sqrt()
        noise = sigma * standard_normal(y.shape, generator, y.device, torch.float64)
        r = observation.observed(y - operator.measure(x / scale) - noise)

        def shift(v: Tensor) -> Tensor:
            """C A^T v, of u = x / s."""
            flat = operator.adjoint(v, self.shape).flatten(1)
            return (flat @ w @ w.T + self.variance * flat).view_as(x)

        def system(v: Tensor) -> Tensor:
            return observation.covariance(v) + observation.observed(operator.measure(shift(v)))

        return x + scale * shift(conjugate_gradients(system, r, 2 * _RANK, _RESIDUAL))


def fit_gaussian(observation: Observation, generator: torch.Generator) -> Gaussian:
    """Fits a Gaussian to the items of an observation, which is linear and of known shape.

    Args:
        observation: the measurements; each item is of another sample.
        generator: the source of the draws for samples of more than 64 values.
    """
    start = start_for(observation, generator)
    return _exact(observation, start) if len(start.mean) <= _LARGEST else _low_rank(observation, start, generator)


def _blocks(observation: Observation) -> Iterator[Observation]:
    n = len(observation)
    return (observation.rows(slice(i, min(i + _BLOCK, n))) for i in range(0, n, _BLOCK))


def start_for(observation: Observation, generator: torch.Generator) -> Gaussian:
    """White noise around samples that are constant in each channel, with the mean and the variance that fit best.

    Those of a channel are computed from the values of y that depend on it; from all values if there is none.
    """
    assert observation.shape is not None  # noqa: S101  (train_from_observations checks it)
    shape, measure = observation.shape, observation.operator.measure
    ones = torch.ones(len(observation), *shape, dtype=torch.float64)
    y, flat = observation.observed(observation.y.double()), observation.observed(measure(ones))
    z = standard_normal(ones.shape, generator, ones.device, torch.float64)
    white = observation.observed(measure(z))

    def of_channels(numerator: Tensor, denominator: Tensor) -> Tensor:
        """The ratio of two sums over the values of y that depend on a channel, for each value of a sample."""
        found = torch.empty(shape, dtype=torch.float64)
        for channel in range(shape[0]):
            alone = torch.zeros_like(z)
            alone[:, channel] = z[:, channel]
            known = observation.observed(measure(alone)) != 0 if shape[0] > 1 else torch.ones_like(y, dtype=torch.bool)
            known = known if bool(known.any()) else torch.ones_like(known)
            below = (denominator * known).sum().clamp(min=1e-300)
            found[channel] = (numerator * known).sum() / below
        return found

    level = of_channels(flat * y, flat.square())
    variance = of_channels((y - observation.observed(measure(level * ones))).square(), white.square()).clamp(min=1e-300)
    scale, psi = (variance.flatten().sqrt(), 1.0) if shape[0] > 1 else (1.0, float(variance.flatten()[0]))
    return Gaussian(shape, level.flatten(), ones.new_zeros(level.numel(), 1), psi, scale)


class _Block(NamedTuple):
    """Items of an observation as matrices, float64; what is not observed is 0."""

    a: Tensor  # (N, M, D)
    y: Tensor  # (N, M)
    seen: Tensor  # (N, M), 1 where y is observed
    noise: Tensor  # (N, M), the variances

    @classmethod
    def of(cls, items: Observation) -> _Block:
        n, shape = len(items), items.shape or ()
        units = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, 1, *shape)
        a = [items.observed(items.operator.measure(unit.expand(n, *shape))) for unit in units]
        ones = torch.ones_like(items.y.double())
        rows = (items.residual(0 * ones), items.observed(ones), items.covariance(ones))
        y, seen, noise = (each.double().flatten(1) for each in rows)
        return cls(torch.stack([each.flatten(1) for each in a], 2), y, seen, noise)

    def posterior(self, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor, float]:
        """The means of the posteriors minus m (N, D), the sum of their covariances (D, D), and the log-likelihood."""
        cross = self.a @ c
        s = cross @ self.a.mT
        jitter = _JITTER * s.diagonal(dim1=1, dim2=2).mean()
        factor = torch.linalg.cholesky(s + torch.diag_embed(self.noise + jitter + (1 - self.seen)))
        r = (self.y - self.a @ m)[..., None]
        half, z = torch.linalg.solve_triangular(factor, torch.cat([cross, r], 2), upper=False).split([len(m), 1], 2)
        d = (half.mT @ z)[..., 0]
        half = half.flatten(0, 1)
        logs = factor.diagonal(dim1=1, dim2=2).log().sum() + self.seen.sum() * math.log(2 * math.pi) / 2
        return d, len(d) * c - half.T @ half, float(-z.square().sum() / 2 - logs)


def _exact(observation: Observation, start: Gaussian) -> Gaussian:
    """The maximum of the likelihood with a full covariance, of u = x / s."""
    s, size = start.scale * torch.ones_like(start.mean), len(start.mean)
    m, c = start.mean / s, start.variance * torch.eye(size, dtype=torch.float64)
    observation = observation.scaled(start.scale_of_sample)
    used = observation.rows(slice(0, _LARGEST_MATRICES // (size * observation.y[0].numel())))
    blocks, n, before = [_Block.of(items) for items in _blocks(used)], len(used), -math.inf
    for _ in range(_ITERATIONS):
        found = [block.posterior(m, c) for block in blocks]
        shift = torch.stack([d.sum(0) for d, _, _ in found]).sum(0) / n
        second = torch.stack([p + d.T @ d for d, p, _ in found]).sum(0) / n
        likelihood = sum(each for _, _, each in found)
        m, c = m + shift, second - shift[:, None] * shift
        if likelihood - before < _TOLERANCE * n:
            break
        before = likelihood
    values, vectors = torch.linalg.eigh(c)
    return Gaussian(start.shape, s * m, s[:, None] * vectors * values.clamp(min=0).sqrt(), 0.0, start.scale)


def _low_rank(observation: Observation, start: Gaussian, generator: torch.Generator) -> Gaussian:
    """The maximum for the moments of draws, again and again; the principal axes are found by subspace iteration."""
    used = observation.rows(slice(0, _ITEMS))
    size, rank, s = len(start.mean), min(_RANK, len(start.mean) - 1), start.scale * torch.ones_like(start.mean)
    axes = torch.linalg.qr(standard_normal((size, rank), generator, start.mean.device, torch.float64)).Q
    found = start
    for _ in range(_ROUNDS):
        total, along, square = torch.zeros_like(found.mean), torch.zeros_like(axes), 0.0
        for block in _blocks(used):
            x = (found.draw(block, generator).flatten(1) - found.mean) / s
            total, along, square = total + x.sum(0), along + x.T @ (x @ axes), square + float(x.square().sum())
        n = len(used)
        shift = total / n
        along = along / n - shift[:, None] * (shift @ axes)  # the covariance of the draws times the axes
        values, vectors = torch.linalg.eigh(axes.T @ along)
        rest = max((square / n - float(shift.square().sum() + values.sum())) / (size - rank), 1e-300)
        factor = s[:, None] * (axes @ vectors) * (values - rest).clamp(min=0).sqrt()
        found = Gaussian(start.shape, found.mean + s * shift, factor, rest, start.scale)
        axes = torch.linalg.qr(along).Q
    return found
