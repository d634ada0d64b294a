r"""Signals with independent increments of heavy tails, whose posteriors are drawn exactly.

They are a test of restoration methods. A signal is the path of a Lévy process at the times 1, ..., D,
:math:`x_k = u_1 + \dots + u_k`, with independent increments u from a Laplace or a Student distribution. Its jumps are
sharp, as the edges of images are, and its posterior is far from a Gaussian. Both distributions are scale mixtures of
Gaussians: u is :math:`\mathcal{N}(0, \tau)` with a random variance :math:`\tau`,

==================================  =====================================  ====================================
density of u                        distribution of tau                    that of tau given u
==================================  =====================================  ====================================
Laplace, :math:`e^{-|u| / b} / 2b`  exponential with the mean 2 b^2        1/tau is inverse Gaussian with the
                                                                           mean 1 / (b \|u\|) and shape 1 / b^2
Student, n degrees, scale s         inverse gamma with shape n/2           inverse gamma with shape (n + 1)/2
                                    and scale n s^2 / 2                    and scale (n s^2 + u^2)/2
==================================  =====================================  ====================================

Given all tau the signal is Gaussian, and given the signal the tau are independent. **Gibbs sampling** draws both in
turn, and converges to the posterior of a linear observation with normal noise.

**Score.** With noise of level sigma the score is :math:`(\mathrm{E}[x_0 | x] - x) / \sigma^2`, and its Jacobian follows
from :math:`\mathrm{Cov}[x_0 | x] / \sigma^2`, the Jacobian of the expectation. Both are not closed. They are estimated
from Gibbs sampling of :math:`x_0` given x: the mean over sweeps of :math:`\mathrm{E}[x_0 | \tau, x]`, which a Kalman
smoother computes in O(D) operations. The error of the estimate is unbiased noise up to the start of the chain, new at
each level. With J sweeps its variance is at most 1/J of that of :math:`x_0` given x: a step from sigma to r sigma then
adds at most :math:`(1 - r)^2 / J` of the variance :math:`\sigma^2`, and the noise of a stochastic sampler is
:math:`1 - r^2` of it.

References:
    Park & Casella, 2008, The Bayesian Lasso, for the Gibbs sampler of Laplace increments.
    Bohra et al., 2023, A Statistical Framework to Investigate the Optimality of Signal-Reconstruction Methods, and
    Zach et al., 2025, arXiv:2509.12821, for the benchmark; arXiv:2503.03007.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import seed_of, single_generator, standard_normal, uniform
from scorematch.evaluation.distribution import Distribution
from scorematch.evaluation.exact import Empirical
from scorematch.evaluation.measurement import linear_gaussian
from scorematch.noise import NoiseSchedule
from scorematch.restoration.observation import Observation

__all__ = ["Increments", "Laplace", "LevyProcess", "Student"]

_BURN_IN = 200  # sweeps before the first draw of a posterior
_DRAWS = 400  # draws that stand for a posterior
_APART = 2  # sweeps from one of these draws to the next


class Increments(ABC):
    """A symmetric distribution of increments, a scale mixture of Gaussians."""

    scale: float

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {self.scale!r}.")

    @property
    @abstractmethod
    def variance(self) -> float:
        """The variance of an increment."""

    @abstractmethod
    def log_density(self, u: Tensor) -> Tensor:
        """The log-density of increments, of the shape of u."""

    @abstractmethod
    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """The variances tau of increments, float64."""

    @abstractmethod
    def given(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """The variances tau given the increments u, float64."""


@dataclass(frozen=True)
class Laplace(Increments):
    r"""The Laplace distribution with the density :math:`\exp(-|u| / b) / (2 b)`, where b is the scale."""

    scale: float = 1.0

    @property
    def variance(self) -> float:
        """The variance, 2 scale^2."""
        return 2 * self.scale**2

    def log_density(self, u: Tensor) -> Tensor:
        """The log-density of increments, of the shape of u."""
        return -u.abs() / self.scale - math.log(2 * self.scale)

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """The variances tau of increments, float64."""
        u = uniform(shape, generator, torch.device("cpu"), torch.float64)
        return -self.variance * (1 - u).log()

    def given(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """The variances tau given the increments u, by the method of Michael, Schucany and Haas (1976)."""
        u = u.abs().clamp(min=1e-12 * self.scale)
        w = self.scale * standard_normal(u.shape, generator, u.device).square() / (2 * u)
        q = 1 + w + (w * (w + 2)).sqrt()  # the two roots for tau are b |u| q and b |u| / q
        first = uniform(u.shape, generator, u.device, u.dtype) <= q / (q + 1)
        return self.scale * u * torch.where(first, q, 1 / q)


@dataclass(frozen=True)
class Student(Increments):
    """Student's t-distribution with more than 2 degrees of freedom, multiplied by a scale."""

    degrees: float = 3.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.degrees > 2:
            raise ValueError(f"degrees must be above 2, so that the variance is finite, got {self.degrees!r}.")

    @property
    def variance(self) -> float:
        """The variance, scale^2 n / (n - 2) for n degrees of freedom."""
        return self.scale**2 * self.degrees / (self.degrees - 2)

    def log_density(self, u: Tensor) -> Tensor:
        """The log-density of increments, of the shape of u."""
        n = self.degrees
        constant = math.lgamma((n + 1) / 2) - math.lgamma(n / 2) - math.log(n * math.pi) / 2 - math.log(self.scale)
        return constant - (n + 1) / 2 * (1 + (u / self.scale).square() / n).log()

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """The variances tau of increments, float64."""
        return self._inverse_gamma(self.degrees / 2, torch.zeros(shape, dtype=torch.float64, device="cpu"), generator)

    def given(self, u: Tensor, generator: torch.Generator | None) -> Tensor:
        """The variances tau given the increments u, float64."""
        return self._inverse_gamma((self.degrees + 1) / 2, u, generator)

    def _inverse_gamma(self, shape: float, u: Tensor, generator: torch.Generator | None) -> Tensor:
        gamma = torch._standard_gamma(torch.full_like(u, shape), generator)
        return (self.degrees * self.scale**2 + u.square()) / (2 * gamma)


class LevyProcess(Distribution):
    """Signals with independent increments; as a callable it is its own score, from Gibbs sampling.

    The random numbers of a score depend on sigma and on the shape of the batch only, so that equal calls return equal
    bits. Everything is computed on the CPU.

    Args:
        increments: the distribution of the increments, ``Laplace`` or ``Student``.
        size: D, the length of a signal.
        sample_shape: the shape of one signal, such as (1, D); None is (D,).
        sweeps: J, the number of Gibbs sweeps of a score, after half as many that are discarded.
        schedule: the noise levels with which samplers use the distribution.

    Example:
        >>> signals = LevyProcess(Student(3.0), 64)
        >>> signals.sample(2, generator=0).shape, signals(torch.zeros(2, 64), 1.0).shape
        (torch.Size([2, 64]), torch.Size([2, 64]))
    """

    def __init__(
        self,
        increments: Increments,
        size: int,
        sample_shape: Sequence[int] | None = None,
        *,
        sweeps: int = 24,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        self.size = check_count("size", size)
        super().__init__((size,) if sample_shape is None else sample_shape, schedule)
        if math.prod(self.sample_shape) != size:
            raise ValueError(f"sample_shape must have {size} values, like the signals, got {self.sample_shape}.")
        self.increments = increments
        self.sweeps = check_count("sweeps", sweeps, 2)

    def __repr__(self) -> str:
        return f"LevyProcess({self.increments}, {self.sample_shape})"

    @property
    def mean(self) -> Tensor:
        """The mean (D,), zeros, float64."""
        return torch.zeros(self.size, dtype=torch.float64, device="cpu")

    @property
    def covariance(self) -> Tensor:
        """The covariance (D, D), the variance of an increment times min(j, k), float64."""
        k = torch.arange(1, self.size + 1, dtype=torch.float64, device="cpu")
        return self.increments.variance * torch.minimum(k[:, None], k)

    def posterior_samples(
        self,
        observation: Observation,
        draws: int,
        generator: torch.Generator | int | None = None,
        *,
        burn_in: int = _BURN_IN,
        apart: int = _APART,
    ) -> Tensor:
        r"""Draws from the posterior of each signal by Gibbs sampling, (N, draws, ...), float64.

        Given tau, a draw u' of the increments and a draw n' of the noise become a draw from the posterior,
        :math:`u' + T B^\top (B T B^\top + S)^{-1} (y - B u' - n')`, with T = diag(tau), x = C u and B = A C.

        Args:
            observation: an observation of N signals with a linear operator, and noise in all observed values.
            draws: the number of draws.
            generator: the source of the random numbers; None is torch's global generator.
            burn_in: the number of sweeps before the first draw.
            apart: the number of sweeps from one draw to the next.

        Raises:
            TypeError, ValueError: as for ``GaussianMixture.posterior``, and if the observation has no noise.
        """
        generator = single_generator(generator)
        found = [linear_gaussian(observation, self.sample_shape, i) for i in range(len(observation))]
        a, y, noise = (torch.stack(each) for each in zip(*found, strict=True))
        some = a.any(2).any(0)  # the values that are observed of at least one signal
        a, y, noise = a[:, some], y[:, some], noise if noise.ndim == 1 else noise[:, some][:, :, some]
        noise = noise[:, None, None] * torch.eye(y.shape[1], device=y.device) if noise.ndim == 1 else noise.clone()
        hidden = noise.diagonal(dim1=1, dim2=2) == 0
        if (hidden & a.any(2)).any():
            raise ValueError("the observation must have noise: pass a sigma above 0.")
        noise.diagonal(dim1=1, dim2=2)[hidden] = 1.0  # rows of A and y that are 0
        b = a.flip(2).cumsum(2).flip(2)  # A C, where C sums the increments
        root = torch.linalg.cholesky(noise)
        tau = torch.full((len(y), b.shape[2]), self.increments.variance, dtype=y.dtype, device=y.device)
        drawn = []
        for sweep in range(burn_in + apart * draws):
            u = tau.sqrt() * standard_normal(tau.shape, generator, y.device)
            n = root @ standard_normal((*y.shape, 1), generator, y.device).double()
            scaled = b * tau[:, None]
            factor = torch.linalg.cholesky(scaled @ b.mT + noise)
            u = u + (scaled.mT @ torch.cholesky_solve(y[..., None] - b @ u[..., None] - n, factor)).squeeze(2)
            tau = self.increments.given(u, generator)
            if sweep >= burn_in and (sweep - burn_in) % apart == 0:
                drawn.append(u.cumsum(1))
        return torch.stack(drawn, 1).view(len(y), draws, *self.sample_shape)

    def posteriors(self, observation: Observation, generator: torch.Generator | int | None = None) -> list[Empirical]:
        """The posteriors of all signals that an observation measures, each as the distribution of 400 exact draws."""
        return [Empirical(draws) for draws in self.posterior_samples(observation, _DRAWS, generator)]

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        tau = self.increments.prior((n, self.size), generator)
        return (tau.sqrt() * standard_normal(tau.shape, generator, tau.device)).cumsum(1)

    def _score(self, x: Tensor, variance: Tensor) -> Tensor:
        denoised: Tensor = _Denoised.apply(x, variance, self.increments, self.sweeps)  # type: ignore[no-untyped-call]
        return (denoised - x) / variance

    def _log_density(self, x: Tensor, variance: Tensor) -> Tensor:
        if variance.any():
            raise ValueError("the density of signals with noise is not known. Leave out sigma.")
        return self.increments.log_density(torch.diff(x, dim=1, prepend=torch.zeros_like(x[:, :1]))).sum(1)


class _Denoised(torch.autograd.Function):
    """The expectation of x0 given x (N, D), with noise of the variance (N, 1) or (1, 1), from Gibbs sampling.

    Inside, time is the first axis: signals are (D, N), and those of all sweeps (D, J, N).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, variance: Tensor, increments: Increments, sweeps: int) -> Tensor:
        generator = single_generator(seed_of("score", repr(float(variance[0]))))
        x, variance = x.T.contiguous(), variance.squeeze(1)
        taus, means = [], []
        tau = torch.full_like(x, increments.variance)
        for sweep in range(-(sweeps // 2), sweeps):
            prior = (tau.sqrt() * standard_normal(x.shape, generator, x.device)).cumsum(0)
            noisy = prior + variance.sqrt() * standard_normal(x.shape, generator, x.device)
            mean, change = _smoothed(torch.stack([x, x - noisy], 1), tau[:, None], variance).unbind(1)
            if sweep >= 0:
                taus.append(tau)
                means.append(mean)
            tau = increments.given(torch.diff(prior + change, dim=0, prepend=torch.zeros_like(x[:1])), generator)
        ctx.save_for_backward(variance, torch.stack(taus, 1), torch.stack(means, 1))
        return torch.stack(means).mean(0).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The product with Cov[x0 | x] / sigma^2, the mean covariance given tau plus the covariance of the means."""
        variance, taus, means = ctx.saved_tensors
        v = grads[0].T[:, None]
        within = _smoothed(v.expand_as(means).contiguous(), taus, variance).mean(1)
        centered = means - means.mean(1, keepdim=True)
        between = ((centered * v).sum(0) * centered).sum(1) / (means.shape[1] - 1)
        return (within + between / variance).T, None, None, None


def _smoothed(x: Tensor, tau: Tensor, variance: Tensor) -> Tensor:
    """The expectation of x0 given x (D, ..., N) and the variances tau of the increments, from Kalman's smoother."""
    mean, spread = torch.zeros_like(x[0]), torch.zeros_like(tau[0])
    means, spreads = [], []
    for value, step in zip(x, tau, strict=True):
        predicted = spread + step
        gain = predicted / (predicted + variance)
        mean, spread = torch.lerp(mean, value, gain.expand_as(mean)), gain * variance
        means.append(mean)
        spreads.append(spread)
    found = [mean]
    for mean, spread, step in zip(means[-2::-1], spreads[-2::-1], tau.flip(0), strict=False):
        gain = spread / (spread + step)
        found.append(torch.lerp(mean, found[-1], gain.expand_as(mean)))
    return torch.stack(found[::-1])
