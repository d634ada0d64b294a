r"""The probability flow: the same densities as the noisy chain passes through, along smooth paths.

With noise of level sigma on the data, the densities :math:`p_\sigma` are also those of the solutions of

.. math:: \frac{dx}{d\sigma} = -\sigma\, s(x, \sigma) = \frac{x - D(x, \sigma)}{\sigma},
          \qquad D(x, \sigma) = x + \sigma^2 s(x, \sigma),

from loud to quiet. Nothing is drawn but the start, and a smooth path can be followed in few, large steps. Both methods
are of second order: half the step, a quarter of the error.

**Heun** (two calls a step) goes with the slope at the step's beginning, and then once more with the mean of that and
the slope found at the end.

**DPM-Solver++(2M)** (one call a step) solves the linear part exactly. In :math:`\lambda = -\log\sigma`, with steps
:math:`h_i = \lambda_{i+1} - \lambda_i`, a denoised image extrapolated from the last two takes the place of D:

.. math:: x_{i+1} = \frac{\sigma_{i+1}}{\sigma_i} x_i + \Bigl(1 - \frac{\sigma_{i+1}}{\sigma_i}\Bigr)
          \Bigl(D_i + \frac{h_i}{2 h_{i-1}} (D_i - D_{i-1})\Bigr),

its first step without the correction. The step to sigma = 0 is with both the last act of all samplers, Tweedie's.

**With an observation.** A path of the flow keeps its noise: where the denoised image does not move it is
:math:`D + \sigma z`, z being the start's own. So what was seen is put in with that z at every level, and nothing else
is drawn: the same start, the same result. A chain that draws fresh noise at every step lets what is hidden settle with
what was seen; a flow does not, and is the poorer restorer for it. Where y is noisy, all paths are given y at its own
noise level, and find one value that agrees with it, not the spread of those that do.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 13.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Alg. 1.
    Lu et al., 2022, DPM-Solver++, arXiv:2211.01095, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule, own_middle, own_schedule
from scorematch.sampling.restoration import Restoration, Restore
from scorematch.sampling.sampler import Precision, Sampler

Method = Literal["heun", "dpm-solver++"]

_LEVELS = 18  # Karras et al.'s for CIFAR-10


class ODESampler(Sampler):
    """The probability flow on any score: few calls, and a map from noise to data.

    It draws nothing but the start: ``noise=`` is never called, and the same ``init`` gives the same samples.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet or any callable.
        schedule: the levels between which the steps are taken; None is ``NoiseSchedule.karras`` from the loudest to
            the quietest of the network's own.
        levels: how many that ladder has; None is 18.
        method: "heun", two network calls a step, or "dpm-solver++", one.

        Rarely needed:

        denoise: whether to end with one step of Tweedie's formula at the quietest level.
        clamp: whether to clamp the result to the network's value range, if it has one.
        restore: how an observation is held to, as for ``AnnealedLangevinSampler``.
        precision: as for ``AnnealedLangevinSampler``, and so is ``compile``.

    Raises:
        TypeError, ValueError: for a ladder that is missing or said twice, or a method that there is not.

    Example:
        >>> import torch
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution, perturbed
        ...     return -x / (1 + sigma**2)
        >>> ODESampler(score, NoiseSchedule.karras(50, 0.01, 18))
        ODESampler(18 levels 50 -> 0.01, heun, 35 network calls)

    References:
        Karras et al., 2022, arXiv:2206.00364, Alg. 1. Lu et al., 2022, arXiv:2211.01095, Alg. 2.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule | None = None,
        *,
        levels: int | None = None,
        method: Method = "heun",
        denoise: bool = True,
        clamp: bool = True,
        restore: Restore = "replace",
        precision: Precision = "auto",
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        own = own_schedule(net)
        if schedule is not None and levels is not None:
            raise ValueError(f"a schedule has its own number of levels: leave out levels, got {levels!r}.")
        if schedule is None and own is not None:
            schedule = NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS if levels is None else levels)
        super().__init__(
            net, schedule, denoise=denoise, clamp=clamp, restore=restore, precision=precision, compile=compile
        )
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}, got {method!r}.")
        self.method = method

    def __len__(self) -> int:
        return (len(self.schedule) - 1) * (2 if self.method == "heun" else 1) + self.denoise

    def _settings(self) -> list[str]:
        return [self.method]

    def _chain(
        self,
        x: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[Tensor], Tensor],
        seen: Restoration,
    ) -> Iterator[tuple[Tensor, float]]:
        ladder = self._ladder(x)
        z = (x - own_middle(self.net)) / self.schedule.sigma_max  # the noise of these paths
        x = seen.project(x, self.schedule.sigma_max, z)
        before: tuple[Tensor, float] | None = None  # the last denoised image, and the step in log sigma that followed
        for level, (sigma, quieter) in enumerate(itertools.pairwise(self.schedule)):
            gradient = score(x, ladder[level])
            if self.method == "heun":
                end = seen.project(torch.add(x, gradient, alpha=(sigma - quieter) * sigma), quieter, z)
                slope = sigma * gradient + quieter * score(end, ladder[level + 1])
                x = torch.add(x, slope, alpha=(sigma - quieter) / 2)
            else:
                denoised, h = torch.add(x, gradient, alpha=sigma**2), math.log(sigma / quieter)
                target = denoised if before is None else denoised + (denoised - before[0]) * (h / (2 * before[1]))
                x = torch.lerp(target, x, quieter / sigma)
                before = denoised, h
            x = seen.project(x, quieter, z)
            yield x, quieter
            self._check_finite(x, level + 1)
