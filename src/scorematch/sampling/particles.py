r"""Twisted sequential Monte Carlo: particles that follow a restoration method and are weighed by the likelihood of y.

The particles of a draw are states of the reverse diffusion. Let D be the denoised image, s the score of the network,
and :math:`\tilde s` that of the restoration method. A step from :math:`\sigma` to the next level :math:`\sigma'` is

.. math:: x' = x + (\sigma^2 - \sigma'^2)\, \tilde s(x) + \sqrt{u}\, z, \qquad
          u = (\sigma^2 - \sigma'^2)\, \frac{\sigma'^2}{\sigma^2}
          + \Bigl( 1 - \frac{\sigma'^2}{\sigma^2} \Bigr)^2 r^2, \qquad r^2 = \frac{\sigma^2 v}{\sigma^2 + v},

where v is the variance of the data. With s in place of :math:`\tilde s` this is the step of ancestral sampling with the
variance "large" in units of the standard deviation of the data, which is exact for Gaussian data with covariance v I.
The step proposes with :math:`q(x' \mid x)` and is corrected by the weight

.. math:: w' = w\, \frac{p(x' \mid x)}{q(x' \mid x)}\, \frac{\tilde p_{\sigma'}(y \mid x')}{\tilde p_\sigma(y \mid x)},
          \qquad \log \frac{p}{q} = -\frac{\delta^\top z}{\sqrt u} - \frac{\lVert \delta \rVert^2}{2 u}, \qquad
          \delta = (\sigma^2 - \sigma'^2) (\tilde s - s),

with the twisting function :math:`\tilde p` (``scorematch.restoration.twist``). If the effective sample size,
:math:`(\sum w)^2 / \sum w^2`, falls below half of the particles, they are drawn again by their weights with systematic
resampling. At the end the twisting function is the likelihood of y given the sample :math:`x_0 = D`.

The mean weight, multiplied over the resamplings, is an unbiased estimate of the evidence
:math:`p(y) = \int p(y \mid x_0)\, p(x_0)\, dx_0`, where :math:`p(x_0)` is the distribution that the sampler draws
without an observation. As the number of particles grows, the weighted particles become samples of the posterior for
this prior with every method, and the methods differ in the number that is needed.

References:
    Wu et al., 2023, Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (TDS),
    arXiv:2306.17775, Alg. 1.
    Del Moral, 2004, Feynman-Kac Formulae, Ch. 7 (the estimate of the evidence is unbiased).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from scorematch.core.randomness import Generator
from scorematch.core.schema import Field
from scorematch.core.scores import Given, Score, middle_of, variance_of
from scorematch.noise import NoiseSchedule
from scorematch.restoration.method import Restoration
from scorematch.restoration.observation import Observation
from scorematch.restoration.twist import Twist
from scorematch.sampling.ancestral import ancestral_step, step_variance
from scorematch.sampling.chain import Chain
from scorematch.sampling.sampler import Sampler, SamplerOptions, without_gradients
from scorematch.sampling.start import start

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ParticleSampler", "Population"]

_LEVELS = 100
_SHARE = 0.5  # of the particles, the effective sample size below which they are resampled


@dataclass(frozen=True, eq=False)
class Population:
    """The particles that answer an observation, in n independent groups of K.

    Attributes:
        samples: (n, ...), one particle of each group, drawn by its weight.
        particles: all of them (n, K, ...).
        weights: (n, K); those of a group have the sum 1.
        log_evidence: (n,), the logarithm of an unbiased estimate of the evidence p(y) of the observation of each group,
            as a density of the observed values in the units of y.
        effective_size: (levels, n), the effective sample size at each level before resampling, from 1 to K.
    """

    samples: Tensor
    particles: Tensor
    weights: Tensor
    log_evidence: Tensor
    effective_size: Tensor


class ParticleSampler(Sampler):
    """Twisted sequential Monte Carlo (TDS): draws of the posterior that become exact as the number of particles grows.

    Each sample is drawn by its weight from a group of particles of its own. ``population`` also returns the particles,
    the effective sample sizes and the evidence. Without an observation a sample needs one particle, and the sampler is
    an ancestral one. The network calls that ``len(sampler)`` counts are those of each particle.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; None uses the network's own, or 100 levels in the same range if
            it has more.
        particles: K, the number of particles for each sample, at least 2.
        **options: the options of every ``Sampler``: ``levels``, ``sigma_max``, ``sigma_min``, ``denoise``, ``clamp``,
            ``restore``, ``precision`` and ``compile``. ``restore`` is the method that proposes particles; "replace"
            stands for "guide".

    Raises:
        TypeError: if an argument has the wrong type, or an option does not exist.
        ValueError: if an option has an invalid value, or a plain function has no schedule.

    Example:
        >>> from scorematch.evaluation.exact import Gaussian
        >>> from scorematch.restoration import Mask
        >>> exact = Gaussian([0.0, 0.0], [[1.0, 0.8], [0.8, 1.0]], schedule=NoiseSchedule.geometric(10, 0.01, 40))
        >>> seen = Observation(Mask(torch.tensor([True, False])), torch.tensor([[1.0, 0.0]]), sigma=0.5)
        >>> found = ParticleSampler(exact, particles=64).population(seen, 50, generator=0, progress=False)
        >>> round(exact.log_evidence(seen), 2), round(float(found.log_evidence.mean()), 1)
        (-1.43, -1.4)
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        particles: Annotated[
            int, Field(int, low=2, high=1_000_000), "the number of particles for each sample of an observation"
        ] = 16,
        **options: Unpack[SamplerOptions],
    ) -> None:
        super().__init__(net, schedule, **options)
        self.check_options({"particles": particles})
        self.particles = particles
        self._k = variance_of(net) ** -0.5

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The network's own levels, respaced to ``levels``, or by default to 100 if there are more."""
        return super().default_schedule(own, min(_LEVELS, len(own)) if levels is None else levels)

    def __len__(self) -> int:
        return len(self.schedule) - 1 + self.denoise

    def settings(self) -> list[str]:
        """The number of particles."""
        return [f"{self.particles} particles"]

    def restoration(self, observation: Observation) -> Restoration:
        """The method, with the likelihood that weighs the particles."""
        middle = middle_of(self.net, observation.y.new_zeros((1, *(observation.shape or ()))))
        return Twist(super().restoration(observation), observation, variance_of(self.net), middle)

    def population(
        self,
        observation: Observation,
        n: int | None = None,
        *,
        shape: Sequence[int] | None = None,
        condition: Given = None,
        generator: Generator = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Population:
        """Draws the samples of ``sample``, and returns them with all particles, their weights and the evidence.

        Arguments and errors are those of ``sample``.
        """
        with without_gradients():
            x, run = start(self, n, shape, None, condition, observation, generator, None, batch_size)
            for x, _ in self._run(x, run, progress):  # noqa: B007, B020
                pass
            particles = run.results.pop("particles")
            found = self._result(particles.flatten(0, 1)).view_as(particles)
            return Population(self._result(x), found, **run.results)

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
        """The ancestral step with the variance u."""
        return ancestral_step(x, score, z, sigma, sigma_next, "large", self._k)

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields one particle of each group after every step, drawn by its weight, and at the end the samples."""
        restoration = chain.restoration
        return self._twisted(x, chain, restoration) if isinstance(restoration, Twist) else super().steps(x, chain)

    def _twisted(self, x: Tensor, chain: Chain, twist: Twist) -> Iterator[tuple[Tensor, float]]:
        weights, lowest = _Weights(len(x) // self.particles, self.particles, x.device), self.schedule.sigma_min
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            z = chain.noise(x)
            prior, posterior = chain.prior_and_posterior(x, sigma)
            likelihood = twist.log_likelihood(torch.add(x, prior, alpha=sigma**2), sigma)
            weights.multiply(likelihood)
            u = chain.uniform()
            rows = weights.resample(u)
            shown = weights.draw(u)
            drift, noise = sigma**2 - sigma_next**2, step_variance("large", sigma, sigma_next, self._k)
            shift = (posterior - prior)[rows] * (drift / math.sqrt(noise))  # delta / sqrt(u)
            x = self.step(x[rows], posterior[rows], z, sigma, sigma_next)
            weights.multiply(-likelihood[rows] - (shift * z + shift.square() / 2).flatten(1).sum(1))
            if self.denoise or sigma_next > lowest:
                yield x[shown], sigma_next
        if self.denoise:
            x = torch.add(x, chain.prior(x, lowest), alpha=lowest**2)
        weights.multiply(twist.log_likelihood(x, lowest, end=True))
        x = twist.method.finish(x)
        groups = x.view(-1, self.particles, *x.shape[1:])
        chain.results.update(particles=groups, **weights.results())
        samples = x[weights.draw(chain.uniform())]
        # A particle that is NaN makes the weights of its group NaN, so that the check of the state finds it.
        unknown = ~weights.log_evidence.isfinite().view(-1, *[1] * (x.ndim - 1))
        yield samples.masked_fill(unknown, math.nan), 0.0 if self.denoise else lowest


class _Weights:
    """The weights of n groups of K particles, and the evidence."""

    def __init__(self, n: int, particles: int, device: torch.device) -> None:
        self._log_weights = torch.zeros(n, particles, device=device)  # since the last resampling of the group
        self._log_evidence = torch.zeros(n, device=device)  # up to then
        self._sizes: list[Tensor] = []

    @property
    def log_evidence(self) -> Tensor:
        return self._log_evidence + self._log_weights.logsumexp(1) - math.log(self._log_weights.shape[1])

    def multiply(self, log_factors: Tensor) -> None:
        self._log_weights = self._log_weights + log_factors.view_as(self._log_weights)

    def resample(self, u: Tensor) -> Tensor:
        """The rows of the particles that go on, (n * K); u (n,) are uniform random numbers."""
        count = self._log_weights.shape[1]
        weights, each = self._log_weights.softmax(1), torch.arange(count, device=u.device)
        self._sizes.append(1 / weights.square().sum(1))
        poor = (self._sizes[-1] < _SHARE * count)[:, None]
        chosen = torch.where(poor, _inverse(weights, (u[:, None] + each) / count), each)
        self._log_evidence = torch.where(poor.squeeze(1), self.log_evidence, self._log_evidence)
        self._log_weights = torch.where(poor, 0, self._log_weights)
        return self._rows(chosen)

    def draw(self, u: Tensor) -> Tensor:
        """The rows of one particle of each group (n,), drawn by its weight with uniform random numbers (n,)."""
        return self._rows(_inverse(self._log_weights.softmax(1), u[:, None]))

    def _rows(self, index: Tensor) -> Tensor:
        """The rows (n * M) of the particles with these indices (n, M) in their groups."""
        n, count = self._log_weights.shape
        return (index + count * torch.arange(n, device=index.device)[:, None]).flatten()

    def results(self) -> dict[str, Tensor]:
        weights = self._log_weights.softmax(1)
        sizes = torch.stack([*self._sizes, 1 / weights.square().sum(1)])
        return {"weights": weights, "log_evidence": self.log_evidence, "effective_size": sizes}


def _inverse(weights: Tensor, u: Tensor) -> Tensor:
    """The inverse of the distribution function of weights (n, K) at u (n, M): indices of particles."""
    return torch.searchsorted(weights.cumsum(1), u, right=True).clamp(max=weights.shape[1] - 1)
