r"""Sampling along the probability flow, an ordinary differential equation, by Heun's method or DPM-Solver++(2M).

Let :math:`p_\sigma` be the density of the data with noise of level sigma. It is also the density of the solutions of

.. math:: \frac{dx}{d\sigma} = -\sigma\, s(x, \sigma) = \frac{x - D(x, \sigma)}{\sigma},
          \qquad D(x, \sigma) = x + \sigma^2 s(x, \sigma),

which is solved from high to low noise. Only the start is random, and the paths are smooth, so that few, large steps are
enough. Both methods are of second order: halving the step divides the error by four.

**Heun** (two calls per step) takes an Euler step, then repeats it with the mean of the slopes at its two ends.

**DPM-Solver++(2M)** (one call per step) solves the linear part exactly. In :math:`\lambda = -\log\sigma`, with steps
:math:`h_i = \lambda_{i+1} - \lambda_i`, D is extrapolated from the last two denoised images:

.. math:: x_{i+1} = \frac{\sigma_{i+1}}{\sigma_i} x_i + \Bigl(1 - \frac{\sigma_{i+1}}{\sigma_i}\Bigr)
          \Bigl(D_i + \frac{h_i}{2 h_{i-1}} (D_i - D_{i-1})\Bigr).

The first step uses :math:`D_i` alone. The step to sigma = 0 is Tweedie's formula, the final denoising of all samplers.

**Churn.** The stochastic sampler of Karras et al. adds noise before each step of Heun's method, and the step removes it
together with the noise of the level:

.. math:: \hat\sigma_i = (1 + \gamma)\, \sigma_i, \qquad
          \hat x = x + S_{noise} \sqrt{\hat\sigma_i^2 - \sigma_i^2}\, z, \qquad
          \gamma = \min(S_{churn} / N,\ \sqrt 2 - 1),

at the levels from :math:`S_{min}` to :math:`S_{max}`, and gamma = 0 at all others; N is the number of levels. New noise
corrects errors of earlier steps, as in Langevin dynamics. With the exact score and :math:`S_{noise} = 1` the density at
each level remains :math:`p_\sigma`. :math:`S_{noise}` slightly above 1 compensates for trained networks, which remove
too much noise. The last step, to sigma = 0, adds no noise.

**With an observation.** A path of the flow keeps its noise: if the denoised image does not change, the state is
:math:`D + \sigma z`, where z is the noise of the start. The observed part is therefore replaced at every level by the
observation with this z as its noise, and the result still depends on the start alone. For ``init``, z is the
difference to the middle of the value range, divided by the highest level. If ``init`` contains an image, this is not
noise, and the samples are wrong: use ``restore="guide"``, or a sampler that draws noise. If a sampler draws new noise
at every step, the hidden part can adapt to the observed part; in a flow it cannot, and restoration is worse. If y is
noisy, the observed part of every path is y itself when sigma reaches the noise level of y. Each result then agrees with
y, but the spread of the results is not that of the posterior. With churn, z is the noise of the state too: at each step
it becomes :math:`(\sigma_i z + \sqrt{\hat\sigma_i^2 - \sigma_i^2}\, z_{new}) / \hat\sigma_i`. At levels below the
noise of y the added variance is limited to :math:`\sigma_i^2 - \sigma_{i+1}^2`, that of the reverse diffusion: more
noise would erase the information about y in the state.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 13.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Alg. 1
    and 2.
    Lu et al., 2022, DPM-Solver++, arXiv:2211.01095, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.schema import Field
from scorematch.core.scores import Score, middle_of
from scorematch.noise import NoiseSchedule
from scorematch.sampling.chain import Chain
from scorematch.sampling.sampler import Sampler, SamplerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["ODESampler"]

Method = Literal["heun", "dpm-solver++"]

_LEVELS = 18  # as in Karras et al. for CIFAR-10
_LONGEST_STEP = 10  # of DPM-Solver++ with second order, relative to the step before


class ODESampler(Sampler):
    """Samples any score along the probability flow, with few network calls.

    Without churn only the start is random: ``sample`` does not call its ``noise_source``, and the same ``init`` gives
    the same samples.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; each step leads from one level to the next. None uses
            ``NoiseSchedule.karras`` between the highest and the lowest level of the network.
        method: "heun", with two network calls per step, or "dpm-solver++", with one.

        Rarely needed:

        churn: S_churn of Karras et al., at least 0, for Heun's method. The noise that is added before a step raises its
            level by the factor 1 + churn / N, where N is the number of levels; values above 0.41 N have the effect of
            0.41 N.
        churn_min: the lowest level at which noise is added, in the units of x: S_min.
        churn_max: the highest level at which noise is added, in the units of x: S_max; None is the highest level. The
            level is raised by up to 41 % before the step, possibly above the range of the network.
        churn_noise: the factor of the added noise, above 0: S_noise.
        **options: the options of every ``Sampler``: ``levels`` (18 by default, if no schedule is given), ``sigma_max``,
            ``sigma_min``, ``denoise``, ``clamp``, ``restore``, ``precision`` and ``compile``.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
        ...     return -x / (1 + sigma**2)
        >>> ODESampler(score, NoiseSchedule.karras(50, 0.01, 18))
        ODESampler(18 levels 50 -> 0.01, heun, 35 network calls)

    References:
        Karras et al., 2022, arXiv:2206.00364, Alg. 1 and 2. Lu et al., 2022, arXiv:2211.01095, Alg. 2.
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        method: Annotated[Method, Field(str, choices=get_args(Method)), "the solver"] = "heun",
        churn: Annotated[float, Field(float, low=0), "with heun: how much new noise the steps add"] = 0.0,
        churn_min: Annotated[float, Field(float, low=0), "the lowest level at which noise is added"] = 0.0,
        churn_max: Annotated[
            float | None, Field(float, low=0), "the highest level at which noise is added (default: no limit)"
        ] = None,
        churn_noise: Annotated[float, Field(float, above=0), "the factor of the added noise"] = 1.0,
        **options: Unpack[SamplerOptions],
    ) -> None:
        super().__init__(net, schedule, **options)
        self.check_options({"method": method, "churn": churn, "churn_noise": churn_noise})
        if churn and method != "heun":
            raise ValueError(
                f"{argument('churn')} is for Heun's method, got {churn!r} with {method!r}. Write "
                f"{argument('method', 'heun')}."
            )
        if not 0 <= churn_min < (math.inf if churn_max is None else churn_max):
            raise ValueError(
                f"{argument('churn_min')} must be at least 0 and below {argument('churn_max')}, got "
                f"{argument('churn_min', churn_min)} and {argument('churn_max', churn_max)}."
            )
        if churn == 0 and (churn_min, churn_max, churn_noise) != (0, None, 1):
            low, high, factor, amount = map(argument, ("churn_min", "churn_max", "churn_noise", "churn"))
            raise ValueError(f"{low}, {high} and {factor} need {amount} above 0. Pass {amount}, or leave them out.")
        self.method = method
        self.churn, self.churn_noise = float(churn), float(churn_noise)
        self.churn_min, self.churn_max = float(churn_min), None if churn_max is None else float(churn_max)

    @property
    def draws_noise(self) -> bool:  # type: ignore[override]
        """Whether there is churn."""
        return self.churn > 0

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The levels of Karras et al. between the highest and the lowest level of the network."""
        if len(own) == 1:
            return own.respaced(1 if levels is None else levels)
        return NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS if levels is None else levels)

    def __len__(self) -> int:
        return (len(self.schedule) - 1) * _METHODS[self.method].calls + self.denoise

    def settings(self) -> list[str]:
        """The method, and the churn."""
        if not self.churn:
            return [self.method]
        high = self.schedule.sigma_max if self.churn_max is None else self.churn_max
        noise = [] if self.churn_noise == 1 else [f"noise {self.churn_noise:g}"]
        return [self.method, f"churn {self.churn:g} at {high:.3g} -> {self.churn_min:.3g}", *noise]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each step of the method, with its level."""
        return self._churned(x, chain) if self.churn else _METHODS[self.method].steps(x, chain, self.schedule)

    def _churned(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        z = (x - middle_of(self.net)) / self.schedule.sigma_max  # the noise of the state
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            new, higher = chain.noise(x), sigma * (1 + self._gamma(sigma))
            if sigma_next < chain.observed_sigma:
                higher = min(higher, math.sqrt(2 * sigma**2 - sigma_next**2))
            added = math.sqrt(higher**2 - sigma**2)
            x = torch.add(x, new, alpha=self.churn_noise * added)
            z = (sigma * z).add_(new, alpha=added).div_(higher)
            x = _heun_step(x, z, chain, higher, sigma_next)
            yield x, sigma_next

    def _gamma(self, sigma: float) -> float:
        """The relative amount by which the noise of a level is raised."""
        high = math.inf if self.churn_max is None else self.churn_max
        return min(self.churn / len(self.schedule), math.sqrt(2) - 1) if self.churn_min <= sigma <= high else 0.0


def _heun_step(x: Tensor, z: Tensor, chain: Chain, sigma: float, sigma_next: float) -> Tensor:
    """The state at the level ``sigma_next``; z is the noise of an observation."""
    x = chain.observe(x, sigma, z)
    score = chain.score(x, sigma)
    end = chain.observe(torch.add(x, score, alpha=(sigma - sigma_next) * sigma), sigma_next, z)
    slope = sigma * score + sigma_next * chain.score(end, sigma_next)
    return torch.add(x, slope, alpha=(sigma - sigma_next) / 2)


def _heun(x: Tensor, chain: Chain, schedule: NoiseSchedule) -> Iterator[tuple[Tensor, float]]:
    for sigma, sigma_next in itertools.pairwise(schedule):
        x = _heun_step(x, chain.noise(x), chain, sigma, sigma_next)
        yield x, sigma_next


def _dpm_solver(x: Tensor, chain: Chain, schedule: NoiseSchedule) -> Iterator[tuple[Tensor, float]]:
    last: tuple[Tensor, float] | None = None  # the previous denoised image, and the step in log sigma from there
    for sigma, sigma_next in itertools.pairwise(schedule):
        x, score, _ = chain(x, sigma)
        denoised, h = torch.add(x, score, alpha=sigma**2), math.log(sigma / sigma_next)
        # After a very short step the extrapolation would amplify rounding errors.
        if last is None or h > _LONGEST_STEP * last[1]:
            target = denoised
        else:
            target = denoised + (denoised - last[0]) * (h / (2 * last[1]))
        x = torch.lerp(target, x, sigma_next / sigma)
        last = denoised, h
        yield x, sigma_next


class _Method(NamedTuple):
    calls: int  # per step
    steps: Callable[[Tensor, Chain, NoiseSchedule], Iterator[tuple[Tensor, float]]]


_METHODS: dict[str, _Method] = {"heun": _Method(2, _heun), "dpm-solver++": _Method(1, _dpm_solver)}
