r"""Annealed Langevin dynamics: Langevin steps at each noise level in turn, from the highest to the lowest.

At level i, T times,

.. math:: x \leftarrow x + a_i\, s(x, \sigma_i) + \sqrt{2 a_i}\, z, \qquad a_i = \epsilon\, \sigma_i^2 / \sigma_L^2,

so that the ratio of signal to noise of a step is the same at every level. This is the convention of Song & Ermon (2020)
and of the code of both papers; the epsilon of the 2019 paper, which writes a/2 and sqrt(a), is twice this one.

Relative to the denoised image :math:`\hat x = x + \sigma_i^2 s` a step shrinks the noise by :math:`1 - a_i/\sigma_i^2`
and adds new noise. If the denoised image does not move, the variance converges to :math:`\sigma_i^2 / (1 - a_i / 2
\sigma_i^2)`, somewhat too much. Noise of variance :math:`2 a_i - a_i^2/\sigma_i^2` (``exact_noise``) makes the step the
exact transition of an Ornstein-Uhlenbeck process around the denoised image, whose variance is :math:`\sigma_i^2` for
every step size.

**Consistent annealed sampling** takes one step from each level to the next and arrives with exactly the noise of that
level: the step leaves noise of deviation :math:`(1 - \eta)\,\sigma_i`, :math:`\eta = \epsilon/\sigma_L^2`, and adds
the rest,

.. math:: x \leftarrow x + \eta \sigma_i^2\, s(x, \sigma_i) + \sqrt{\sigma_{i+1}^2 - (1 - \eta)^2 \sigma_i^2}\, z,
          \qquad i = 1 \dots L-1.

The last level is left by Tweedie's formula, as in the authors' code. With r for :math:`\sigma_{i+1}/\sigma_i` the root
is real for :math:`1 - r \le \eta \le 1 + r`. Write :math:`\eta = 1 - r^p`: at p = 1 no noise is added, and the step is
an Euler step of the probability flow (DDIM); at p = 2 it is the step of ancestral sampling. The published settings are
near p = 1.5. The exponent p is the amount of new noise per factor of sigma, and does not depend on the number of
levels.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Alg. 1.
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011, Alg. 1.
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling for Image Generation,
    arXiv:2009.05475, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule
from scorematch.protocol import Score, attribute, schedule_of
from scorematch.sampling.sampler import Chain, Sampler, SamplerOptions
from scorematch.sampling.settings import SamplerSettings

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The p of consistent sampling without settings. Each noisy step of a learned score adds its error: 1.1 was best on a
# network of color images (docs/pretrained.md). A plain callable may be exact, and gets the step of ancestral sampling.
_POWER_OF_NETWORKS, _POWER = 1.1, 2.0
# A network without settings is sampled on at least and at most so many levels.
_FEWEST_LEVELS, _MOST_LEVELS = 100, 250
# Plain Langevin dynamics without settings: at least so many steps per level, and at most so much variance at the end of
# the schedule, in units of what it should be.
_FEWEST_STEPS = 3
_LARGEST_VARIANCE = 1.2


class AnnealedLangevinSampler(Sampler):
    """Annealed Langevin dynamics on any score.

    Arguments left as None use the network's recommended settings, ``net.sampler_settings``. Without these, a network is
    sampled consistently, in at most 250 calls; a plain callable by the published algorithm, with the step size of
    technique 4 of NCSNv2 and as few steps per level, 3 at least, as keep the variance at the end of the whole schedule
    within 1.2 of what it should be. On another schedule than the recommended one, the kind of sampling is kept, and the
    step size follows from the schedule.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels that the chain descends; None is the recommended schedule, in the range of the levels
            that the network was trained on. They need not be those of training.
        steps_per_level: Langevin steps at each level. More than one step disables consistent sampling.
        step_size: epsilon, the step at the lowest level, in units of sigma squared, below 2 sigma_min^2.

        Rarely needed:

        exact_noise: whether the noise of a step has variance 2a - a^2/sigma^2 instead of 2a. True or False disables
            consistent sampling.
        consistent: whether to sample consistently: one step from each level to the next, with the noise that is missing
            there. With r for the smallest ratio of a level to the one before, the step size then lies between
            sigma_min^2 (1 - r) and sigma_min^2 (1 + r); by default it is sigma_min^2 (1 - r^p), with the p of the
            recommended settings, at most 2, or 1.1 for a network without settings; for a plain callable p is 2, as in
            ancestral sampling.
        **options: ``levels``, ``denoise``, ``clamp``, ``restore``, ``precision`` and ``compile``, as for every
            ``Sampler``.

    Raises:
        TypeError, ValueError: for a schedule that is missing, counts below 1, a step size at or beyond the stability
            limit, arguments that contradict consistent sampling, or an option that is not known.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution with noise
        ...     return -x / (1 + sigma**2)
        >>> AnnealedLangevinSampler(score, NoiseSchedule.geometric(50, 0.01, 50))
        AnnealedLangevinSampler(50 levels 50 -> 0.01, 5 steps, step 1.8e-05, 251 network calls)
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        steps_per_level: int | None = None,
        step_size: float | None = None,
        exact_noise: bool | None = None,
        consistent: bool | None = None,
        **options: Unpack[SamplerOptions],
    ) -> None:
        own = schedule_of(net)
        settings = _recommended_settings(net)
        if steps_per_level is not None and (not isinstance(steps_per_level, int) or steps_per_level < 1):
            raise ValueError(f"steps_per_level must be an integer of at least 1, got {steps_per_level!r}.")
        if consistent and (steps_per_level not in (None, 1) or exact_noise is not None):
            raise ValueError(
                "consistent sampling takes one step per level, and its noise follows from the schedule: leave out "
                f"steps_per_level and exact_noise, got {steps_per_level!r} and {exact_noise!r}."
            )
        if consistent is None:
            kind = settings.consistent or False if settings is not None else own is not None and len(own) > 1
            consistent = kind and steps_per_level in (None, 1) and exact_noise is None
        self.consistent = bool(consistent)
        self._settings = settings
        super().__init__(net, schedule, **options)

        recommended = own is not None and self.schedule == self.default_schedule(own, None)
        if settings is not None and bool(settings.consistent) != self.consistent:
            settings = None  # they were found for the other kind of sampling
        measured = settings.step_size if settings is not None and recommended else None
        if self.consistent:
            self.steps_per_level = 1
            self.exact_noise = False
            if step_size is None:
                step_size = measured or self.schedule.sigma_min**2 * self._consistent_eta(own, settings)
        else:
            stored = None if settings is None else settings.steps_per_level
            self.steps_per_level = steps_per_level or stored or _derived_steps(self.schedule)
            if step_size is None:
                step_size = measured or self.schedule.suggest_step_size(self.steps_per_level)
            if exact_noise is None:
                exact_noise = settings.exact_noise if settings is not None else None
            self.exact_noise = own is not None if exact_noise is None else bool(exact_noise)
        _check_step(self.schedule, step_size, self.steps_per_level, self.consistent)
        self.step_size = float(step_size)

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The recommended number of levels in the range of the network's own."""
        if levels is None and self._settings is not None:
            levels = self._settings.levels
        if levels is None and self.consistent:
            levels = min(_MOST_LEVELS, max(_FEWEST_LEVELS, len(own)))
        return own if levels is None or len(own) == 1 else _without_gaps(own, levels)

    def _consistent_eta(self, own: NoiseSchedule | None, settings: SamplerSettings | None) -> float:
        """The step in units of sigma squared, 1 - r^p.

        With recommended settings p is theirs, but at most 2: on another number of levels than they were measured on,
        larger steps lost contrast (docs/samplers.md).
        """
        ratio, power = _smallest_ratio(self.schedule), _POWER if own is None else _POWER_OF_NETWORKS
        if own is not None and settings is not None and settings.step_size is not None:
            intended = self.default_schedule(own, None)
            left = 1 - settings.step_size / intended.sigma_min**2
            power = min(_POWER, math.log(left) / math.log(_smallest_ratio(intended))) if 0 < left < 1 else _POWER
        return 1 - ratio**power if ratio < 1 else 0.5

    def __len__(self) -> int:
        return (len(self.schedule) - self.consistent) * self.steps_per_level + self.denoise

    def settings(self) -> list[str]:
        """Steps per level, step size, and the kind of noise."""
        steps = f"{self.steps_per_level} step{'s' if self.steps_per_level > 1 else ''}"
        noise = ["consistent"] if self.consistent else ["exact noise"] if self.exact_noise else []
        return [steps, f"step {self.step_size:.2g}", *noise]

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float) -> Tensor:
        """The consistent step to the next level."""
        eta = self.step_size / self.schedule.sigma_min**2
        missing = following**2 - ((1 - eta) * sigma) ** 2  # without noise it is slightly below 0 by rounding
        x = torch.add(x, score, alpha=eta * sigma**2, out=score)
        return x.add_(z, alpha=math.sqrt(max(0.0, missing)))

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """One step from level to level for consistent sampling, else Langevin steps at each level."""
        return super().steps(x, chain) if self.consistent else self._langevin_steps(x, chain)

    def _langevin_steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        a = self.step_size / self.schedule.sigma_min**2  # in units of sigma^2, the same at every level
        deviation = math.sqrt(2 * a - a**2 if self.exact_noise else 2 * a)
        for sigma in self.schedule:
            for _ in range(self.steps_per_level):
                x, score, z = chain(x, sigma, stay=True)
                x = torch.add(x, score, alpha=a * sigma**2, out=score)
                x.add_(z, alpha=sigma * deviation)
                yield x, sigma


def _recommended_settings(net: object) -> SamplerSettings | None:
    """The settings of a network, if they are for annealed Langevin dynamics."""
    settings = attribute(net, "sampler_settings")
    return settings if isinstance(settings, SamplerSettings) and settings.sampler == "langevin" else None


def _smallest_ratio(schedule: NoiseSchedule) -> float:
    """Of a level to the one before; 1 for a schedule of one level."""
    return min((low / high for high, low in itertools.pairwise(schedule)), default=1.0)


def _check_step(schedule: NoiseSchedule, step_size: float, steps: int, consistent: bool) -> None:
    limit = 2 * schedule.sigma_min**2
    if not 0 < step_size < limit:
        raise ValueError(
            f"step_size must lie between 0 and the stability limit, 2 sigma_min^2 = {limit:.4g}, got "
            f"{step_size!r}; technique 4 suggests {schedule.suggest_step_size(steps):.3g}."
        )
    low, high = (schedule.sigma_min**2 * (1 + sign * _smallest_ratio(schedule)) for sign in (-1, 1))
    if consistent and not low * (1 - 1e-9) <= step_size <= high * (1 + 1e-9):
        raise ValueError(
            f"on this schedule the step_size of consistent sampling must lie between {low:.4g} and {high:.4g}, "
            "sigma_min^2 (1 -+ r) with r the smallest ratio of a level to the one before, got "
            f"{step_size!r}. For plain Langevin steps pass steps_per_level or consistent=False."
        )


def _without_gaps(own: NoiseSchedule, levels: int) -> NoiseSchedule:
    """A network's own schedule on another number of levels, or the geometric one where that would leave wide gaps.

    The lowest levels of a DDPM's thousand are far apart: of fifty, the last two would differ by a factor of eight.
    """
    respaced = own.respaced(levels)
    even = NoiseSchedule.geometric(own.sigma_max, own.sigma_min, levels)
    return even if _smallest_ratio(respaced) < 0.9999 * _smallest_ratio(even) else respaced


def _derived_steps(schedule: NoiseSchedule) -> int:
    steps = _FEWEST_STEPS
    while schedule.chain_variance(schedule.suggest_step_size(steps), steps) > _LARGEST_VARIANCE:
        steps += 1
    return steps
