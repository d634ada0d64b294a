r"""Annealed Langevin dynamics: Langevin steps at each noise level in turn, from loud to quiet.

At level i, T times,

.. math:: x \leftarrow x + a_i\, s(x, \sigma_i) + \sqrt{2 a_i}\, z, \qquad a_i = \epsilon\, \sigma_i^2 / \sigma_L^2,

so that signal and noise of a step keep their proportion at every level. This is the convention of Song & Ermon (2020)
and of both their programs; the epsilon of the 2019 paper, which writes a/2 and sqrt(a), is twice this one.

Seen from the denoised image :math:`\hat x = x + \sigma_i^2 s` a step shrinks the noise by :math:`1 - a_i/\sigma_i^2`
and adds new noise. If the denoised image does not move, the variance settles at :math:`\sigma_i^2 / (1 - a_i / 2
\sigma_i^2)`: the plain step is always somewhat too loud. Noise of variance :math:`2 a_i - a_i^2/\sigma_i^2`
(``exact_noise``) makes the step the exact transition of an Ornstein-Uhlenbeck process around the denoised image,
whose variance is :math:`\sigma_i^2` for every step size.

**Consistent annealed sampling** takes one step from a level to the next, with the noise that the next one begins with:
the step leaves :math:`(1 - \eta)\,\sigma_i` of it, :math:`\eta = \epsilon/\sigma_L^2`, and the rest is new,

.. math:: x \leftarrow x + \eta \sigma_i^2\, s(x, \sigma_i) + \sqrt{\sigma_{i+1}^2 - (1 - \eta)^2 \sigma_i^2}\, z,
          \qquad i = 1 \dots L-1.

The last level is left by Tweedie's formula, as in the authors' program. With r for :math:`\sigma_{i+1}/\sigma_i` the
root is real for :math:`1 - r \le \eta \le 1 + r`. At 1 - r no noise is added, and the step is an Euler step of the
probability flow (DDIM); at :math:`1 - r^2` it is the step of ancestral sampling. The published settings lie between,
near 1.5 (1 - r).

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Alg. 1.
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011, Alg. 1.
    Jolicoeur-Martineau et al., 2020, Adversarial Score Matching and Improved Sampling for Image Generation,
    arXiv:2009.05475, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule, own, own_schedule
from scorematch.sampling.restoration import Restoration, Restore
from scorematch.sampling.sampler import Precision, Sampler

_SETTINGS = {"levels", "steps_per_level", "step_size", "exact_noise", "consistent"}  # what a network may recommend
_FEWEST_STEPS = 3
_LOUDEST_CHAIN = 1.2  # the variance, in units of its own, that a chain of derived settings may end with


class AnnealedLangevinSampler(Sampler):
    """Annealed Langevin dynamics on any score.

    What is None is the network's own recommendation, which was measured on the trained network and counts with its own
    ladder only. Without one it follows from the ladder: technique 4 of NCSNv2 for the step, and as few steps a level,
    3 at least, as keep the variance at the end of the whole ladder within 1.2 of what it should be.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet or any callable.
        schedule: the ladder that the chain descends; None is the network's. It need not be the ladder of training.
        steps_per_level: Langevin steps at each level.
        step_size: epsilon, the step at the quietest level, in units of sigma squared, below 2 sigma_min^2.

        Rarely needed:

        denoise: whether to end with one step of Tweedie's formula at the quietest level.
        clamp: whether to clamp the result to the network's value range, if it has one.
        exact_noise: whether a step's noise has variance 2a - a^2/sigma^2 instead of 2a. Not given: a network's
            recommendation, True for a network without one, False for a plain callable.
        consistent: whether to sample consistently: one step from a level to the next, with the noise that is missing
            there. Not given: a network's recommendation, if neither several steps nor exact_noise are asked for; else
            False. With r for the smallest ratio of a level to the one before, the step then lies between
            sigma_min^2 (1 - r) and sigma_min^2 (1 + r), by default at sigma_min^2 (1 - r^2).
        restore: how an observation is held to: "replace" (an operator without a gain is guided), "guide" or
            "guide-jacobian", which takes about 2.5 times as long; see ``scorematch.sampling.restoration``.
        precision: "float32" calls the network as it is; "auto" calls its inference copy, made once per ``sample``: the
            fastest whose samples are statistically the same. Scores that have none are called as they are.
        compile: whether to run that copy through ``torch.compile``, which pays in long runs. It warns, and goes on
            without, where there is no compiler.

    Raises:
        TypeError, ValueError: for a ladder that is missing, counts below 1, a step at or beyond the stability limit,
            settings that consistent sampling leaves no choice of, or compilation of what has no inference copy.

    Example:
        >>> import torch
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution, perturbed
        ...     return -x / (1 + sigma**2)
        >>> AnnealedLangevinSampler(score, NoiseSchedule.geometric(50, 0.01, 50))
        AnnealedLangevinSampler(50 levels 50 -> 0.01, 5 steps, step 1.8e-05, 251 network calls)
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule | None = None,
        *,
        steps_per_level: int | None = None,
        step_size: float | None = None,
        denoise: bool = True,
        clamp: bool = True,
        exact_noise: bool | None = None,
        consistent: bool | None = None,
        restore: Restore = "replace",
        precision: Precision = "auto",
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        ladder = own_schedule(net)
        settings: dict[str, Any] = own(net, "sampler_settings") or {}
        unknown = sorted(settings.keys() - _SETTINGS)
        if unknown:
            raise ValueError(f"sampler_settings knows {', '.join(sorted(_SETTINGS))}, got {', '.join(unknown)}.")
        recommended = ladder
        if ladder is not None and "levels" in settings:
            recommended = _recommended(ladder, settings["levels"])
        schedule = recommended if schedule is None else schedule
        super().__init__(
            net, schedule, denoise=denoise, clamp=clamp, restore=restore, precision=precision, compile=compile
        )
        schedule = self.schedule
        if schedule != recommended:
            settings = {}
        measured = settings.get("consistent", False)
        if consistent is None:  # whoever asks for several steps, or a kind of noise, has chosen against it
            consistent = measured and steps_per_level in (None, 1) and exact_noise is None
        if consistent != measured:
            settings = {}  # what was measured with another rule for the noise
        if consistent and (steps_per_level not in (None, 1) or exact_noise is not None):
            raise ValueError(
                "consistent sampling takes one step a level, and its noise follows from the ladder: leave out "
                f"steps_per_level and exact_noise, got {steps_per_level!r} and {exact_noise!r}."
            )
        if steps_per_level is None:
            steps_per_level = 1 if consistent else settings.get("steps_per_level") or _derived_steps(schedule)
        if not isinstance(steps_per_level, int) or steps_per_level < 1:
            raise ValueError(f"steps_per_level must be an integer of at least 1, got {steps_per_level!r}.")
        if step_size is None:
            step_size = settings.get("step_size")
        if step_size is None:
            ratio = _smallest_ratio(schedule)
            default = schedule.sigma_min**2 * (1 - ratio**2) if consistent and ratio < 1 else None
            step_size = default or schedule.suggest_step_size(steps_per_level)
        _check_step(schedule, step_size, steps_per_level, consistent)
        if exact_noise is None:
            exact_noise = settings.get("exact_noise", ladder is not None) and not consistent
        self.steps_per_level = steps_per_level
        self.step_size = float(step_size)
        self.exact_noise = bool(exact_noise)
        self.consistent = bool(consistent)

    def __len__(self) -> int:
        return (len(self.schedule) - self.consistent) * self.steps_per_level + self.denoise

    def _settings(self) -> list[str]:
        steps = f"{self.steps_per_level} step{'s' if self.steps_per_level > 1 else ''}"
        noise = ["consistent"] if self.consistent else ["exact noise"] if self.exact_noise else []
        return [steps, f"step {self.step_size:.2g}", *noise]

    def _chain(
        self,
        x: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[Tensor], Tensor],
        seen: Restoration,
    ) -> Iterator[tuple[Tensor, float]]:
        relative = self.step_size / self.schedule.sigma_min**2  # a in units of sigma^2, the same at every level
        ladder = self._ladder(x)
        if self.consistent:
            for level, (sigma, quieter) in enumerate(itertools.pairwise(self.schedule)):
                missing = quieter**2 - ((1 - relative) * sigma) ** 2  # a little below 0 by rounding, if without noise
                z = noise(x)
                x = seen.project(x, sigma, z)
                gradient = score(x, ladder[level])
                x = torch.add(x, gradient, alpha=relative * sigma**2, out=gradient)
                x.add_(z, alpha=math.sqrt(max(0.0, missing)))
                yield x, quieter
                self._check_finite(x, level + 1)
            return
        variance = 2 * relative - relative**2 if self.exact_noise else 2 * relative
        for level, sigma in enumerate(self.schedule):
            for _ in range(self.steps_per_level):
                z = noise(x)
                x = seen.project(x, sigma, z)
                gradient, z = seen.settle(x, score(x, ladder[level]), z, sigma)
                x = torch.add(x, gradient, alpha=relative * sigma**2, out=gradient)
                x.add_(z, alpha=sigma * math.sqrt(variance))
                yield x, sigma
            self._check_finite(x, level)


def _smallest_ratio(schedule: NoiseSchedule) -> float:
    """Of a level to the one before; 1 for a ladder of one level."""
    sigmas = schedule.sigmas
    return float((sigmas[1:] / sigmas[:-1]).min()) if len(schedule) > 1 else 1.0


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
            f"on this ladder a consistent step_size must lie between {low:.4g} and {high:.4g}, sigma_min^2 (1 -+ r) "
            f"with r the smallest ratio of a level to the one before, got {step_size!r}."
        )


def _recommended(own: NoiseSchedule, levels: int) -> NoiseSchedule:
    """A network's own ladder on fewer levels, or the geometric one where that would leave wide gaps.

    A DDPM's thousand levels quieten fast at the end: of fifty, the last two would be eight times apart.
    """
    respaced = own.respaced(levels)
    if len(own) == 1:
        return respaced
    even = NoiseSchedule.geometric(own.sigma_max, own.sigma_min, levels)
    return even if _smallest_ratio(respaced) < 0.9999 * _smallest_ratio(even) else respaced


def _derived_steps(schedule: NoiseSchedule) -> int:
    steps = _FEWEST_STEPS
    while schedule.chain_variance(schedule.suggest_step_size(steps), steps) > _LOUDEST_CHAIN:
        steps += 1
    return steps
