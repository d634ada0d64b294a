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
and noise n; the linear system is solved by conjugate gradients, with products of the operators only. All computations
are in float64 on the CPU.

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
    """The normal distribution with the mean m and the covariance W W^T + psi I.

    Attributes:
        shape: the shape of one sample, of D values.
        mean: m (D,), float64.
        factor: W (D, rank), float64.
        variance: psi.
    """

    shape: tuple[int, ...]
    mean: Tensor
    factor: Tensor
    variance: float

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), float64."""
        return self.factor @ self.factor.T + self.variance * torch.eye(len(self.mean), dtype=torch.float64)

    @property
    def variances(self) -> Tensor:
        """The variance of each value (D,), float64."""
        return self.factor.square().sum(1) + self.variance

    def product(self, x: Tensor) -> Tensor:
        """The product of the covariance with samples (N, ...)."""
        flat = x.flatten(1)
        return (flat @ self.factor @ self.factor.T + self.variance * flat).view_as(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws n samples (n, ...), float64."""
        z, e = (
            standard_normal((n, size), generator, self.mean.device, torch.float64) for size in self.factor.shape[::-1]
        )
        return (self.mean + z @ self.factor.T + self.variance**0.5 * e).view(n, *self.shape)

    def draw(self, observation: Observation, generator: torch.Generator) -> Tensor:
        """Draws from the posterior of each item of a linear observation, (N, ...), float64."""
        x, operator, y = self.sample(len(observation), generator), observation.operator, observation.y.double()
        sigma = observation.covariance(torch.ones_like(y)).sqrt()
        noise = sigma * standard_normal(y.shape, generator, y.device, torch.float64)
        r = observation.observed(y - operator.measure(x) - noise)

        def system(v: Tensor) -> Tensor:
            spread = operator.measure(self.product(operator.adjoint(v, self.shape)))
            return observation.covariance(v) + observation.observed(spread)

        v = conjugate_gradients(system, r, 2 * _RANK, _RESIDUAL)
        return x + self.product(operator.adjoint(v, self.shape))


def fit_gaussian(observation: Observation, generator: torch.Generator) -> Gaussian:
    """Fits a Gaussian to the items of an observation, which is linear and of known shape.

    Args:
        observation: the measurements; each item is of another sample.
        generator: the source of the draws for samples of more than 64 values.
    """
    start = _start(observation, generator)
    return _exact(observation, start) if len(start.mean) <= _LARGEST else _low_rank(observation, start, generator)


def _blocks(observation: Observation) -> Iterator[Observation]:
    n = len(observation)
    return (observation.rows(slice(i, min(i + _BLOCK, n))) for i in range(0, n, _BLOCK))


def _start(observation: Observation, generator: torch.Generator) -> Gaussian:
    """White noise around the constant sample that fits best, with the variance of the rest."""
    assert observation.shape is not None  # noqa: S101  (train_from_observations checks it)
    shape, size = observation.shape, math.prod(observation.shape)
    ones = torch.ones(len(observation), *shape, dtype=torch.float64)
    flat = observation.observed(observation.operator.measure(ones))
    y = observation.observed(observation.y.double())
    level = float((flat * y).sum() / flat.square().sum().clamp(min=1e-300))
    white = observation.operator.measure(standard_normal(ones.shape, generator, ones.device, torch.float64))
    gain = observation.observed(white).square().sum()
    variance = float((y - level * flat).square().sum() / gain)
    return Gaussian(shape, ones.new_full((size,), level), ones.new_zeros(size, 1), max(variance, 1e-300))


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
    """The maximum of the likelihood with a full covariance."""
    m, c = start.mean, start.covariance
    used = observation.rows(slice(0, _LARGEST_MATRICES // (len(m) * observation.y[0].numel())))
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
    return Gaussian(start.shape, m, vectors * values.clamp(min=0).sqrt(), 0.0)


def _low_rank(observation: Observation, start: Gaussian, generator: torch.Generator) -> Gaussian:
    """The maximum for the moments of draws, again and again; the principal axes are found by subspace iteration."""
    used = observation.rows(slice(0, _ITEMS))
    size, rank = len(start.mean), min(_RANK, len(start.mean) - 1)
    axes = torch.linalg.qr(standard_normal((size, rank), generator, start.mean.device, torch.float64)).Q
    found = start
    for _ in range(_ROUNDS):
        total, along, square = torch.zeros_like(found.mean), torch.zeros_like(axes), 0.0
        for block in _blocks(used):
            x = found.draw(block, generator).flatten(1) - found.mean
            total, along, square = total + x.sum(0), along + x.T @ (x @ axes), square + float(x.square().sum())
        n = len(used)
        shift = total / n
        along = along / n - shift[:, None] * (shift @ axes)  # the covariance of the draws times the axes
        values, vectors = torch.linalg.eigh(axes.T @ along)
        rest = max((square / n - float(shift.square().sum() + values.sum())) / (size - rank), 1e-300)
        factor = axes @ vectors * (values - rest).clamp(min=0).sqrt()
        found = Gaussian(start.shape, found.mean + shift, factor, rest)
        axes = torch.linalg.qr(along).Q
    return found
