r"""The probability flow: the same densities as the noisy chain passes through, along smooth paths.

With noise of level sigma on the data, the densities :math:`p_\sigma` are also those of the solutions of

.. math:: \frac{dx}{d\sigma} = -\sigma\, s(x, \sigma) = \frac{x - D(x, \sigma)}{\sigma},
          \qquad D(x, \sigma) = x + \sigma^2 s(x, \sigma),

from high to low noise. Only the start is random, and a smooth path can be followed in few, large steps. Both methods
are of second order: half the step, a quarter of the error.

**Heun** (two calls per step) takes an Euler step, and repeats it with the mean of the slopes at its beginning and end.

**DPM-Solver++(2M)** (one call per step) solves the linear part exactly. In :math:`\lambda = -\log\sigma`, with steps
:math:`h_i = \lambda_{i+1} - \lambda_i`, D is extrapolated from the last two denoised images:

.. math:: x_{i+1} = \frac{\sigma_{i+1}}{\sigma_i} x_i + \Bigl(1 - \frac{\sigma_{i+1}}{\sigma_i}\Bigr)
          \Bigl(D_i + \frac{h_i}{2 h_{i-1}} (D_i - D_{i-1})\Bigr),

its first step without the correction. The step to sigma = 0 is the final denoising of all samplers, Tweedie's formula.

**With an observation.** A path of the flow keeps its noise: where the denoised image does not move, the state is
:math:`D + \sigma z`, z being the noise of the start. What was observed is therefore put in with that z at every level,
and the result still depends on the start alone. A chain that draws new noise at every step lets the hidden part adapt
to the observed part; a flow does not, and restores less well. Where y is noisy, all paths receive y itself at its own
noise level: each finds a value that agrees with it, but their spread is not that of the posterior.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 13.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Alg. 1.
    Lu et al., 2022, DPM-Solver++, arXiv:2211.01095, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule
from scorematch.protocol import Score
from scorematch.sampling.sampler import Chain, Sampler, SamplerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Method = Literal["heun", "dpm-solver++"]

_LEVELS = 18  # as Karras et al. for CIFAR-10


class ODESampler(Sampler):
    """The probability flow on any score: few calls, and a map from noise to data.

    Only the start is random: ``noise=`` is never called, and the same ``init`` gives the same samples.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the levels between which the steps are taken; None is ``NoiseSchedule.karras`` from the highest to
            the lowest of the network's own.
        method: "heun", two network calls per step, or "dpm-solver++", one.
        **options: ``levels`` (None is 18 levels where no schedule is given), ``denoise``, ``clamp``, ``restore``,
            ``precision`` and ``compile``, as for every ``Sampler``.

    Raises:
        TypeError, ValueError: for a schedule that is missing, or an option that is not known.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution with noise
        ...     return -x / (1 + sigma**2)
        >>> ODESampler(score, NoiseSchedule.karras(50, 0.01, 18))
        ODESampler(18 levels 50 -> 0.01, heun, 35 network calls)

    References:
        Karras et al., 2022, arXiv:2206.00364, Alg. 1. Lu et al., 2022, arXiv:2211.01095, Alg. 2.
    """

    draws_noise = False

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        method: Method = "heun",
        **options: Unpack[SamplerOptions],
    ) -> None:
        super().__init__(net, schedule, **options)
        if method not in _METHODS:
            raise ValueError(f"method must be one of {', '.join(map(repr, _METHODS))}, got {method!r}.")
        self.method = method

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The levels of Karras et al., in the range of the network's own."""
        return NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS if levels is None else levels)

    def __len__(self) -> int:
        return (len(self.schedule) - 1) * _METHODS[self.method].calls + self.denoise

    def settings(self) -> list[str]:
        """The method."""
        return [self.method]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """The states of the method, one for each level."""
        return _METHODS[self.method].steps(x, chain, self.schedule)


def _heun(x: Tensor, chain: Chain, schedule: NoiseSchedule) -> Iterator[tuple[Tensor, float]]:
    for sigma, following in itertools.pairwise(schedule):
        x, score, z = chain(x, sigma)
        end = chain.observe(torch.add(x, score, alpha=(sigma - following) * sigma), following, z)
        slope = sigma * score + following * chain.score(end, following)
        x = torch.add(x, slope, alpha=(sigma - following) / 2)
        yield x, following


def _dpm_solver(x: Tensor, chain: Chain, schedule: NoiseSchedule) -> Iterator[tuple[Tensor, float]]:
    last: tuple[Tensor, float] | None = None  # the last denoised image, and the step in log sigma that followed
    for sigma, following in itertools.pairwise(schedule):
        x, score, _ = chain(x, sigma)
        denoised, h = torch.add(x, score, alpha=sigma**2), math.log(sigma / following)
        target = denoised if last is None else denoised + (denoised - last[0]) * (h / (2 * last[1]))
        x = torch.lerp(target, x, following / sigma)
        last = denoised, h
        yield x, following


class _Method(NamedTuple):
    calls: int  # per step
    steps: Callable[[Tensor, Chain, NoiseSchedule], Iterator[tuple[Tensor, float]]]


_METHODS: dict[str, _Method] = {"heun": _Method(2, _heun), "dpm-solver++": _Method(1, _dpm_solver)}
