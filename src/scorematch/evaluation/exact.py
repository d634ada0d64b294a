r"""Distributions with known scores: Gaussians, mixtures of Gaussians, and the empirical distribution of a data set.

With noise of level sigma, a mixture :math:`\sum_k w_k \mathcal{N}(m_k, C)` becomes
:math:`\sum_k w_k \mathcal{N}(m_k, C + \sigma^2 I)`, with the score

.. math:: s(x, \sigma) = (C + \sigma^2 I)^{-1} \Bigl( \sum_k r_k(x)\, m_k - x \Bigr), \qquad
          r_k(x) \propto w_k\, \mathcal{N}(x;\, m_k, C + \sigma^2 I) .

A Gaussian is a mixture of one component. The empirical distribution of a data set has one component for each image,
with :math:`C = h^2 I`: for a bandwidth h of zero its score is the minimizer of the denoising loss on the data set, and
exact sampling with it returns training images. With a positive bandwidth it is the score of a kernel density estimate.

Each distribution is a score: ``distribution(x, sigma)``, which samplers, losses and ``log_likelihood`` accept. With a
``schedule`` it is sampled like a network, with the defaults of each sampler.

**Posterior.** For a linear observation :math:`y = A x_0 + \sigma_y n` with :math:`S = A C A^\top + \sigma_y^2 I`, the
posterior of a mixture is the mixture with

.. math:: m_k' = m_k + C A^\top S^+ (y - A m_k), \qquad C' = C - C A^\top S^+ A C, \qquad
          w_k' \propto w_k \exp\bigl(-\tfrac12 (y - A m_k)^\top S^+ (y - A m_k)\bigr) .

If S is singular, components whose :math:`y - A m_k` is not in its range have the weight zero: they contradict y.

All computations are in float64, on the device of the distribution's tensors, or on the CPU where that device has no
float64. The results have the device and the dtype of x.

References:
    Vincent, 2011, A Connection Between Score Matching and Denoising Autoencoders (the empirical score).
    Karras et al., 2022, arXiv:2206.00364, Eq. 57 (the minimizer of the denoising loss on a finite data set).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from scorematch.core.randomness import standard_normal
from scorematch.evaluation.accumulate import Moments
from scorematch.evaluation.distribution import Distribution
from scorematch.evaluation.measurement import linear_gaussian, operator_matrix
from scorematch.evaluation.rows import double, is_symmetric
from scorematch.noise import NoiseSchedule
from scorematch.restoration.observation import Observation

__all__ = ["Distribution", "Empirical", "Gaussian", "GaussianMixture", "operator_matrix"]

_BLOCK = 1024  # images of an empirical distribution that are compared at a time
_NEGATIVE = 1e-6  # the tolerance for negative eigenvalues of a covariance, relative to the largest
_KNOWN = 1e-9  # the tolerance of squared distances from y where the components do not vary, relative to the largest one


class GaussianMixture(Distribution):
    r"""The mixture :math:`\sum_k w_k \mathcal{N}(m_k, C)` of Gaussians with the same covariance.

    Args:
        weights: (K,), positive; they are divided by their sum.
        means: (K, D).
        covariance: C, (D, D), or a number v, for v times the identity.
        sample_shape: the shape of one sample, with D values; None is (D,).
        schedule: the noise levels with which samplers use the distribution.
        value_range: the range of the data.

    Attributes:
        weights: (K,), float64.
        means: (K, D), float64.

    Raises:
        ValueError: if shapes do not fit, a weight is not positive, or the covariance is not symmetric or has negative
            eigenvalues.

    Example:
        >>> two = GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], 0.25)
        >>> two(torch.tensor([[0.0], [9.0]]), 0.5).tolist()  # (-+1 - x) / (0.25 + sigma^2), weighted
        [[0.0], [-16.0]]
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        covariance: float | Sequence[Sequence[float]] | Tensor,
        sample_shape: Sequence[int] | None = None,
        *,
        schedule: NoiseSchedule | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        self.means = _float64(means)
        if self.means.ndim != 2:
            raise ValueError(f"means must be (K, D), got shape {tuple(self.means.shape)}.")
        count, size = self.means.shape
        self.weights = _float64(weights).to(self.means.device)
        if self.weights.shape != (count,) or not (self.weights > 0).all():
            raise ValueError(f"weights must be {count} positive numbers, one for each mean, got {weights!r}.")
        self.weights = self.weights / self.weights.sum()
        super().__init__((size,) if sample_shape is None else sample_shape, schedule, value_range)
        if math.prod(self.sample_shape) != size:
            raise ValueError(f"sample_shape must have {size} values, like the means, got {self.sample_shape}.")
        self._within = _float64(covariance).to(self.means.device)
        if self._within.ndim == 0:
            self._within = self._within * torch.eye(size, dtype=torch.float64, device=self.means.device)
        self._values, self._vectors = _eigen(self._within, size)
        self._center = self.weights @ self.means
        self._along = (self.means - self._center) @ self._vectors  # the means along the axes of C

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weights)} components, {self.sample_shape})"

    def definition(self) -> list[Any]:
        """The public attributes and the covariance of the components."""
        return [*super().definition(), self._within]

    @property
    def mean(self) -> Tensor:
        """The mean (D,), float64."""
        return self._center

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D) of the whole mixture, float64."""
        centered = self.means - self.mean
        return self._within + centered.T @ (self.weights[:, None] * centered)

    def posterior(self, observation: Observation, image: int = 0) -> GaussianMixture:
        """The posterior of the sample that an observation measures.

        Args:
            observation: an observation with a linear operator, of one sample or several.
            image: the number of the sample in the observation.

        Returns:
            The posterior, of the same class, with the same schedule and value range.

        Raises:
            TypeError: if ``observation`` is not an Observation.
            ValueError: if the operator is not linear, the observation is of samples of another shape, or it has no
                sample with this number.
        """
        weights, means, covariance = self._posterior_parameters(observation, image)
        return GaussianMixture(weights, means, covariance, **self._attributes)

    def posteriors(
        self, observation: Observation, generator: torch.Generator | int | None = None
    ) -> list[GaussianMixture]:
        """The posteriors of all samples that an observation measures; they need no random numbers."""
        return [self.posterior(observation, image) for image in range(len(observation))]

    def log_evidence(self, observation: Observation, image: int = 0) -> float:
        r"""The log-density of y, :math:`\log \sum_k w_k\, \mathcal{N}(y;\, A m_k, S)`, of the observed values, in nats.

        Arguments and errors are those of ``posterior``.

        Raises:
            ValueError: if S is singular, as for several values of y without noise that determine each other.
        """
        a, y, noise = (each.to(self.means) for each in linear_gaussian(observation, self.sample_shape, image))
        part = observation.of_shape(self.sample_shape).rows(slice(image, image + 1))
        seen = part.observed(torch.ones_like(part.y)).flatten().to(y.device) > 0
        a, y = a[seen], y[seen]
        noise = noise[seen][:, seen] if noise.ndim else noise * torch.ones_like(y).diag()
        factor, failed = torch.linalg.cholesky_ex(a @ self._within @ a.T + noise)
        if failed:
            raise ValueError("y has no density, since its values determine each other. Pass sigma above 0.")
        residuals = torch.linalg.solve_triangular(factor, (y - self.means @ a.T).T, upper=False)  # (values of y, K)
        logits = self.weights.log() - residuals.square().sum(0) / 2
        return float(logits.logsumexp(0) - factor.diagonal().log().sum() - len(y) * math.log(2 * math.pi) / 2)

    def _posterior_parameters(self, observation: Observation, image: int) -> tuple[Tensor, Tensor, Tensor]:
        a, y, noise = (each.to(self.means) for each in linear_gaussian(observation, self.sample_shape, image))
        cross = self._within @ a.T
        values, vectors = torch.linalg.eigh(a @ cross + (noise if noise.ndim else 0))
        exact = len(values) * torch.finfo(values.dtype).eps * values[-1]  # eigenvalues up to their rounding error are 0
        values = torch.where(values > exact, values, 0) + (0 if noise.ndim else noise)  # those of S
        inverse = torch.where(values > 0, 1 / values, 0)
        residuals = (y - self.means @ a.T) @ vectors  # (K, values of y), along the axes of S
        logits = self.weights.log() - (residuals.square() @ inverse) / 2
        # Without noise, the part of y in the directions in which no component varies selects the nearest components.
        outside = residuals[:, values == 0].square().sum(1)
        logits[outside > outside.min() + _KNOWN * residuals.square().sum(1).max()] = -math.inf
        weights = logits.softmax(0).clamp(min=torch.finfo(torch.float64).tiny)
        cross = cross @ vectors
        # Rounding, relative to the covariance of the prior, can make the smallest eigenvalues negative.
        values, vectors = torch.linalg.eigh(self._within - cross * inverse @ cross.T)
        covariance = vectors * values.clamp(min=0) @ vectors.T
        return weights, self.means + residuals * inverse @ cross.T, (covariance + covariance.T) / 2

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        source = torch.device("cpu") if generator is None else generator.device
        weights = self.weights.float() if source.type == "mps" else self.weights  # MPS does not support float64
        component = torch.multinomial(weights.to(source), n, replacement=True, generator=generator)
        z = standard_normal((n, self.means.shape[1]), generator, self.means.device).double()
        return self.means[component.to(self.means.device)] + z * self._values.sqrt() @ self._vectors.T

    def _score(self, x: Tensor, variance: Tensor) -> Tensor:
        along, v = (x - self._center) @ self._vectors, self._values + variance
        _, expected = _components(along, v, [(self._along, self.weights.log())])
        return (expected - along) / v @ self._vectors.T

    def _log_density(self, x: Tensor, variance: Tensor) -> Tensor:
        along, v = (x - self._center) @ self._vectors, self._values + variance
        total, _ = _components(along, v, [(self._along, self.weights.log())])
        return total + _log_normal(along, v)


class Gaussian(GaussianMixture):
    """The normal distribution.

    Args:
        mean: (D,).
        covariance: (D, D), or a number v, for v times the identity.
        sample_shape: the shape of one sample, with D values; None is (D,).
        schedule: the noise levels with which samplers use the distribution.
        value_range: the range of the data.

    Attributes:
        values: the eigenvalues of the covariance (D,), ascending, float64.
        vectors: its eigenvectors, the columns of (D, D), float64.

    Example:
        >>> Gaussian([0.0, 1.0], [[1.0, 0.0], [0.0, 4.0]])(torch.tensor([[1.0, 0.0]]), 1.0)
        tensor([[-0.5000,  0.2000]])
    """

    def __init__(
        self,
        mean: Sequence[float] | Tensor,
        covariance: float | Sequence[Sequence[float]] | Tensor,
        sample_shape: Sequence[int] | None = None,
        *,
        schedule: NoiseSchedule | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        means = _float64(mean)[None]
        super().__init__([1.0], means, covariance, sample_shape, schedule=schedule, value_range=value_range)
        self.values, self.vectors = self._values, self._vectors

    def _score(self, x: Tensor, variance: Tensor) -> Tensor:
        return (self._center - x) @ self._vectors / (self._values + variance) @ self._vectors.T

    def __repr__(self) -> str:
        return f"Gaussian({self.sample_shape})"

    @classmethod
    def like(cls, distribution: Distribution) -> Gaussian:
        """The normal distribution with the mean, the covariance and the other attributes of a distribution.

        ``Gaussian.like(Empirical(images))`` is a normal distribution fitted to images.
        """
        return cls(distribution.mean, distribution.covariance, **distribution._attributes)

    def posterior(self, observation: Observation, image: int = 0) -> Gaussian:
        """The posterior of the sample that an observation measures; see ``GaussianMixture.posterior``."""
        _, means, covariance = self._posterior_parameters(observation, image)
        return Gaussian(means[0], covariance, **self._attributes)


class Empirical(Distribution):
    r"""The empirical distribution of a data set, or its kernel density :math:`\frac1N \sum_i \mathcal{N}(x_i, h^2 I)`.

    A score is computed with one pass over the data, in blocks: for n images it needs n N D multiplications twice, and
    in addition to the data the memory of a block of 1,024 images in float64.

    Args:
        data: (N, ...), floating point, or uint8 images, which stand for their values divided by 255.
        bandwidth: h, at least 0, in the units of the data.
        schedule: the noise levels with which samplers use the distribution.
        value_range: the range of the data.

    Raises:
        TypeError: if the data are neither floating point nor uint8.
        ValueError: if there are no data, or the bandwidth is negative.

    Example:
        >>> Empirical(torch.tensor([[0.0], [1.0]]))(torch.tensor([[0.5], [3.0]]), 0.1).round().tolist()
        [[0.0], [-200.0]]
    """

    def __init__(
        self,
        data: Tensor,
        bandwidth: float = 0.0,
        *,
        schedule: NoiseSchedule | None = None,
        value_range: tuple[float, float] | None = None,
    ) -> None:
        if not isinstance(data, Tensor) or not (data.is_floating_point() or data.dtype == torch.uint8):
            kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(f"data must be a tensor (N, ...), floating point or uint8, got {kind}.")
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(f"data must be a batch (N, ...) with at least one sample, got shape {tuple(data.shape)}.")
        if not bandwidth >= 0:
            raise ValueError(f"bandwidth must be at least 0, got {bandwidth!r}.")
        super().__init__(data.shape[1:], schedule, value_range)
        self.bandwidth = float(bandwidth)
        self._data = data.detach().flatten(1)

    def __repr__(self) -> str:
        return f"Empirical({len(self)} x {self.sample_shape}, bandwidth {self.bandwidth:g})"

    @cached_property
    def data_std(self) -> float:
        """The root of the mean variance of the values, computed without the covariance."""
        squares = sum(float((block - self.mean).square().sum()) for block in self._blocks())
        return math.sqrt(squares / self._data.numel() + self.bandwidth**2)

    def definition(self) -> list[Any]:
        """The public attributes and the data."""
        return [*super().definition(), self._data]

    def __len__(self) -> int:
        """The number of samples in the data set."""
        return len(self._data)

    @property
    def mean(self) -> Tensor:
        """The mean (D,), float64."""
        return self._center

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), float64: that of the data with the divisor N, plus the squared bandwidth."""
        d, n = self._data.shape[1], len(self)
        kernel = self.bandwidth**2 * torch.eye(d, dtype=torch.float64, device=self.mean.device)
        return kernel if n == 1 else self._moments.covariance * ((n - 1) / n) + kernel

    @cached_property
    def _center(self) -> Tensor:
        return torch.stack([block.sum(0) for block in self._blocks()]).sum(0) / len(self)

    @cached_property
    def _moments(self) -> Moments:
        return Moments.of(self._blocks())

    def _blocks(self) -> Iterator[Tensor]:
        for block in self._data.split(_BLOCK):
            yield _values(block)

    def _components(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The data in blocks relative to the mean, with the logarithms of their weights."""
        for block in self._blocks():
            yield block - self.mean, block.new_tensor(-math.log(len(self)))

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        source = torch.device("cpu") if generator is None else generator.device
        chosen = torch.randint(len(self), (n,), generator=generator, device=source)
        x = _values(self._data[chosen.to(self._data.device)])
        return x + self.bandwidth * standard_normal(x.shape, generator, x.device).double() if self.bandwidth else x

    def _score(self, x: Tensor, variance: Tensor) -> Tensor:
        centered, v = x - self.mean, variance + self.bandwidth**2
        _, expected = _components(centered, v.expand(-1, x.shape[1]), self._components())
        return (expected - centered) / v

    def _log_density(self, x: Tensor, variance: Tensor) -> Tensor:
        centered, v = x - self.mean, (variance + self.bandwidth**2).expand(-1, x.shape[1])
        total, _ = _components(centered, v, self._components())
        return total + _log_normal(centered, v)


# -- Mixtures in float64 ----------------------------------------------------------------------------------------------


def _components(x: Tensor, variance: Tensor, blocks: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""Sums over the components of a mixture in blocks of their means (K, D) and log weights (K,) or ().

    Args:
        x: (N, D).
        variance: of each axis, (N, D) or (1, D).
        blocks: the components.

    Returns:
        :math:`\log \sum_k w_k \exp(-|x - m_k|^2 / 2v + |x|^2 / 2v)` (N,), and the mean of the m_k (N, D), each weighted
        by its term of the sum.
    """
    total, mean = x.new_full((len(x), 1), -math.inf), torch.zeros_like(x)
    for means, log_weights in blocks:
        logits = (x / variance) @ means.T - (0.5 / variance) @ means.square().T + log_weights
        new = torch.logaddexp(total, logits.logsumexp(1, keepdim=True))
        mean = mean * (total - new).exp() + (logits - new).exp() @ means
        total = new
    return total.squeeze(1), mean


def _log_normal(x: Tensor, variance: Tensor) -> Tensor:
    """The log-density (N,) of independent normal values (N, D) with mean 0."""
    least, most = variance.aminmax(dim=1)
    if not (least > variance.shape[1] * torch.finfo(variance.dtype).eps * most).all():
        raise ValueError(
            "the distribution has no density, since the covariance of its components is singular. Pass a higher sigma, "
            "the noise level."
        )
    return -(x.square() / variance + (2 * math.pi * variance).log()).sum(1) / 2


def _values(data: Tensor) -> Tensor:
    return double(data) / 255 if data.dtype == torch.uint8 else double(data)


def _float64(values: float | Sequence[float] | Sequence[Sequence[float]] | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return double(values.detach())
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _eigen(covariance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The eigenvalues, at least 0, and the eigenvectors of a checked covariance."""
    if covariance.shape != (size, size):
        raise ValueError(f"covariance must be ({size}, {size}) or a number, got shape {tuple(covariance.shape)}.")
    if not is_symmetric(covariance):
        raise ValueError("covariance must be symmetric and finite.")
    values, vectors = torch.linalg.eigh(covariance)
    if values[0] < -_NEGATIVE * values[-1].abs():
        raise ValueError(
            f"covariance must have no negative eigenvalues, got eigenvalues from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}."
        )
    return values.clamp(min=0), vectors
