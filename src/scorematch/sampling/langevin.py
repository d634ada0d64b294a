r"""Annealed Langevin dynamics: Langevin steps at each noise level in turn, from the highest to the lowest.

At level i, this step is taken T times:

.. math:: x \leftarrow x + a_i\, s(x, \sigma_i) + \sqrt{2 a_i}\, z, \qquad a_i = \epsilon\, \sigma_i^2 / \sigma_L^2.

With this :math:`a_i` the signal-to-noise ratio of a step is the same at every level. Song & Ermon (2020) and the code
of both papers use the same convention; the 2019 paper writes a/2 and sqrt(a), so its epsilon is twice this one.

Relative to the denoised image :math:`\hat x = x + \sigma_i^2 s` a step multiplies the noise by
:math:`1 - a_i/\sigma_i^2` and adds new noise. If the denoised image does not change, the variance converges to
:math:`\sigma_i^2 / (1 - a_i / 2 \sigma_i^2)`, which is larger than :math:`\sigma_i^2`. With noise of variance
:math:`2 a_i - a_i^2/\sigma_i^2` (``exact_noise``) the step is the exact transition of an Ornstein-Uhlenbeck process
around the denoised image, whose variance is :math:`\sigma_i^2` for every step size.

**Consistent annealed sampling** takes one step from each level to the next, and the result has exactly the noise of the
next level. With :math:`\eta = \epsilon/\sigma_L^2` the step reduces the noise to the standard deviation
:math:`(1 - \eta)\,\sigma_i`, and adds what is missing to :math:`\sigma_{i+1}`:

.. math:: x \leftarrow x + \eta \sigma_i^2\, s(x, \sigma_i) + \sqrt{\sigma_{i+1}^2 - (1 - \eta)^2 \sigma_i^2}\, z,
          \qquad i = 1 \dots L-1.

At the last level Tweedie's formula gives the result, as in the authors' code. Let :math:`r = \sigma_{i+1}/\sigma_i`.
The square root is real for :math:`1 - r \le \eta \le 1 + r`. Write :math:`\eta = 1 - r^p`. At p = 1 no noise is added,
and the step is an Euler step of the probability flow (DDIM); at p = 2 it is the step of ancestral sampling. The
published settings are near p = 1.5. The exponent p says how much new noise is added while sigma falls by a given
factor; it does not depend on the number of levels. With an observation, p is 2 at levels below the noise of y, where
the noise of the state is a part of the noise of y: more new noise would erase the information about y in the state, and
with less the state would keep too much of the noise of y.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Alg. 1.
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011, Alg. 1.
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling for Image Generation,
    arXiv:2009.05475, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.schema import Field
from scorematch.core.scores import Score, attribute
from scorematch.noise import NoiseSchedule, schedule_of
from scorematch.sampling.chain import Chain
from scorematch.sampling.sampler import Sampler, SamplerOptions, stored_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AnnealedLangevinSampler"]


# The exponent p of consistent sampling for networks without settings, and for plain functions. With a learned score,
# each step that adds noise also adds an error: p = 1.1 was best for a network of color images (docs/pretrained.md), and
# a row of the preconditioning table may have another. A plain function may be an exact score, and is sampled with the
# step of ancestral sampling, p = 2.
_POWER_OF_NETWORKS, _POWER = 1.1, 2.0
# The smallest and the largest number of levels for a network without settings.
_FEWEST_LEVELS, _MOST_LEVELS = 100, 250
# Plain Langevin dynamics without settings: the smallest number of steps per level, and the largest variance at the end
# of the schedule, in units of sigma_min^2.
_FEWEST_STEPS = 3
_LARGEST_VARIANCE = 1.2


class AnnealedLangevinSampler(Sampler):
    """Annealed Langevin dynamics for any score.

    Arguments left as None use the network's recommended settings, ``net.sampler_settings``. If the schedule is not the
    recommended one, the recommended kind of sampling is kept, and the step size is derived from the schedule. A network
    without settings is sampled consistently with at most 250 network calls.

    A plain function is sampled by the published algorithm: the step size is that of technique 4 of NCSNv2 (Song &
    Ermon, 2020), and the number of steps per level is the smallest, but at least 3, for which the variance at the end
    of the schedule is at most 1.2 sigma_min^2. A network without settings is sampled in the same way, but with exact
    noise, if it has one noise level, or has fewer than 100 and its scores at other levels are not trained (the
    preconditioning "ncsn").

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; None uses the recommended number of levels in the range of the
            levels that the network was trained on. They need not be the levels of training.
        steps_per_level: Langevin steps at each level, at least 1. More than one step disables consistent sampling.
        step_size: epsilon, the step size at the lowest level, in squared units of x, between 0 and 2 sigma_min^2.

        Rarely needed:

        exact_noise: whether the noise of a step has variance 2a - a^2/sigma^2 instead of 2a. True or False disables
            consistent sampling. None uses the recommended settings, or else True for a network and False for a plain
            function.
        consistent: whether to sample consistently: one step from each level to the next, which adds exactly the noise
            that is missing to the next level. None uses the recommended settings, or else True for a network, unless
            it knows few levels or only one, and False for a plain function. Let r be the smallest ratio of a level to
            the one before. The step size must lie between sigma_min^2 (1 - r) and sigma_min^2 (1 + r). Its default is
            sigma_min^2 (1 - r^p), where p is derived from the recommended settings and at most 2. Without settings p
            is 1.1 for a network, 1.5 for one with the preconditioning "ncsnpp", and 2, as in ancestral sampling, for a
            plain function.
        **options: the options of every ``Sampler``: ``levels``, ``sigma_max``, ``sigma_min``, ``denoise``, ``clamp``,
            ``restore``, ``precision`` and ``compile``.

    Raises:
        TypeError: if an argument has the wrong type, or an option does not exist.
        ValueError: if an option has an invalid value, a plain function has no schedule, the step size is outside its
            range, or steps_per_level or exact_noise contradicts ``consistent=True``.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
        ...     return -x / (1 + sigma**2)
        >>> AnnealedLangevinSampler(score, NoiseSchedule.geometric(50, 0.01, 50))
        AnnealedLangevinSampler(50 levels 50 -> 0.01, 5 steps, step 1.8e-05, 251 network calls)
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        steps_per_level: Annotated[
            int | None, Field(int, low=1, high=1_000_000), "the number of Langevin steps at each level"
        ] = None,
        step_size: Annotated[
            float | None,
            Field(float, above=0, units=2),
            "the step size at the lowest level, above 0 and below 2 sigma_min^2",
        ] = None,
        exact_noise: Annotated[
            bool | None,
            Field(bool),
            "whether the noise of a Langevin step of size a has variance 2a - a^2/sigma^2 instead of 2a; both "
            "--exact-noise and --no-exact-noise turn off consistent sampling",
        ] = None,
        consistent: Annotated[
            bool | None,
            Field(bool),
            "consistent sampling: one step from each level to the next that adds exactly the missing noise",
        ] = None,
        **options: Unpack[SamplerOptions],
    ) -> None:
        own, settings = schedule_of(net), stored_options(net, "langevin")
        if own is not None and settings is not None:
            own = own.between(settings.get("sigma_max"), settings.get("sigma_min"))
            if schedule is None and options.get("sigma_max") is None:
                options["sigma_max"] = own.sigma_max
            if schedule is None and options.get("sigma_min") is None:
                options["sigma_min"] = own.sigma_min
        if steps_per_level is not None:
            steps_per_level = check_count("steps_per_level", steps_per_level)
        _check_kind(consistent, steps_per_level, exact_noise)
        if consistent is None:
            consistent = _is_fine(net, own) if settings is None else settings.get("consistent")
            consistent = consistent and steps_per_level in (None, 1) and exact_noise is None
        self.consistent = bool(consistent)
        self._settings = settings
        if settings is not None and bool(settings.get("consistent")) == self.consistent:
            options.setdefault("denoise", settings.get("denoise", True))
        super().__init__(net, schedule, **options)

        recommended = own is not None and self.schedule == self._default_levels(own, None)
        if settings is not None and bool(settings.get("consistent")) != self.consistent:
            settings = None  # they are for the other kind of sampling
        of_settings = settings or {}
        intended = recommended and of_settings.get("levels") in (None, len(self.schedule))
        measured = of_settings.get("step_size") if intended else None
        if self.consistent:
            self.steps_per_level = 1
            self.exact_noise = False
            if step_size is None:
                step_size = measured or self.schedule.sigma_min**2 * self._consistent_eta(own, settings)
        else:
            stored = of_settings.get("steps_per_level")
            self.steps_per_level = steps_per_level or stored or _derived_steps(self.schedule)
            if step_size is None:
                step_size = measured or self.schedule.suggest_step_size(self.steps_per_level)
            if exact_noise is None:
                exact_noise = of_settings.get("exact_noise")
            self.exact_noise = own is not None if exact_noise is None else bool(exact_noise)
        _check_step(self.schedule, step_size, self.steps_per_level, self.consistent)
        self.step_size = float(step_size)

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """As ``Sampler.check_options``."""
        super().check_options(options)
        _check_kind(options.get("consistent"), options.get("steps_per_level"), options.get("exact_noise"))

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The recommended number of levels, or ``levels``, in the range of the network's own levels."""
        if len(own) == 1:
            return own.respaced(1 if levels is None else levels)
        if levels is None and self._settings is not None:
            levels = self._settings.get("levels")
        if levels is None and self.consistent:
            levels = min(_MOST_LEVELS, max(_FEWEST_LEVELS, len(own)))
        return own if levels is None else own.without_gaps(levels)

    def _consistent_eta(self, own: NoiseSchedule | None, settings: Mapping[str, Any] | None) -> float:
        """The step size divided by sigma squared, 1 - r^p; without effect for a single level, which has no steps.

        With recommended settings, p is derived from them but limited to 2: if the number of levels differs from theirs,
        larger steps reduce the contrast (docs/samplers.md).
        """
        ratio, power = self.schedule.smallest_ratio, _POWER
        if own is not None:
            power = getattr(attribute(self.net, "preconditioning"), "power", _POWER_OF_NETWORKS)
        if own is not None and settings is not None and "step_size" in settings:
            intended = self.default_schedule(own, None)
            eta, intended_ratio = settings["step_size"] / intended.sigma_min**2, intended.smallest_ratio
            power = _POWER
            if 0 < eta < 1 and intended_ratio < 1:
                power = min(_POWER, math.log(1 - eta) / math.log(intended_ratio))
        return 1 - ratio**power if ratio < 1 else 0.5

    def __len__(self) -> int:
        return (len(self.schedule) - self.consistent) * self.steps_per_level + self.denoise

    def settings(self) -> list[str]:
        """Steps per level, step size, and the kind of noise."""
        steps = f"{self.steps_per_level} step{'s' if self.steps_per_level > 1 else ''}"
        noise = ["consistent"] if self.consistent else ["exact noise"] if self.exact_noise else []
        return [steps, f"step {self.step_size:.2g}", *noise]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Consistent sampling takes one step from each level to the next; otherwise Langevin steps at each level."""
        return self._consistent_steps(x, chain) if self.consistent else self._langevin_steps(x, chain)

    def _consistent_steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            x, score, z = chain(x, sigma)
            eta = self.step_size / self.schedule.sigma_min**2
            if sigma_next < chain.observed_sigma:
                eta = 1 - (sigma_next / sigma) ** 2  # the step of ancestral sampling, p = 2
            missing = sigma_next**2 - ((1 - eta) * sigma) ** 2  # at p = 1 rounding can make it negative
            x = torch.add(x, score, alpha=eta * sigma**2, out=score)
            x.add_(z, alpha=math.sqrt(max(0.0, missing)))
            yield x, sigma_next

    def _langevin_steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        a = self.step_size / self.schedule.sigma_min**2  # divided by sigma^2, the same at every level
        deviation = math.sqrt(2 * a - a**2 if self.exact_noise else 2 * a)
        for sigma in self.schedule:
            for _ in range(self.steps_per_level):
                x, score, z = chain(x, sigma, stay=True)
                x = torch.add(x, score, alpha=a * sigma**2, out=score)
                x.add_(z, alpha=sigma * deviation)
                yield x, sigma


def _is_fine(net: Score, own: NoiseSchedule | None) -> bool:
    """Whether a score is sampled consistently by default: a network that has or can be given many noise levels."""
    if own is None or len(own) == 1:
        return False
    return not getattr(attribute(net, "preconditioning"), "discrete", False) or len(own) >= _FEWEST_LEVELS


def _check_kind(consistent: bool | None, steps_per_level: int | None, exact_noise: bool | None) -> None:
    if consistent and (steps_per_level not in (None, 1) or exact_noise is not None):
        raise ValueError(
            f"{argument('consistent', True)} takes one step per level and derives the noise from the schedule: "
            f"leave out {argument('steps_per_level')} and {argument('exact_noise')}, got {steps_per_level!r} and "
            f"{exact_noise!r}."
        )


def _check_step(schedule: NoiseSchedule, step_size: float, steps: int, consistent: bool) -> None:
    limit = 2 * schedule.sigma_min**2
    if not 0 < step_size < limit:
        raise ValueError(
            f"{argument('step_size')} must lie between 0 and the stability limit, 2 sigma_min^2 = {limit:.4g}, got "
            f"{step_size!r}; technique 4 of NCSNv2 suggests {schedule.suggest_step_size(steps):.3g}."
        )
    low, high = (schedule.sigma_min**2 * (1 + sign * schedule.smallest_ratio) for sign in (-1, 1))
    if consistent and not low * (1 - 1e-9) <= step_size <= high * (1 + 1e-9):
        raise ValueError(
            f"{argument('step_size')} must lie between {low:.4g} and {high:.4g} for consistent sampling on this "
            "schedule, sigma_min^2 (1 - r) and sigma_min^2 (1 + r) with r the smallest ratio of a level to the one "
            f"before, got {step_size!r}. For plain Langevin steps pass {argument('steps_per_level')} or "
            f"{argument('consistent', False)}."
        )


def _derived_steps(schedule: NoiseSchedule) -> int:
    steps = _FEWEST_STEPS
    while schedule.chain_variance(schedule.suggest_step_size(steps), steps) > _LARGEST_VARIANCE:
        steps += 1
    return steps
