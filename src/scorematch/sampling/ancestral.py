r"""Ancestral sampling: one step from each noise level to the next, as DDPM and Palette do.

Their chains live in other coordinates. With :math:`\gamma_t = 1 / (1 + s_t^2)`, s being sigma in the units of images
in [-1, 1], theirs is :math:`y_t = \sqrt{\gamma_t}\, x_t`, the network's answer is :math:`f = -s_t` times the score, and
Palette's Algorithm 2,

.. math:: y_{t-1} = \frac{1}{\sqrt{\alpha_t}} \Bigl( y_t - \frac{1 - \alpha_t}{\sqrt{1 - \gamma_t}} f \Bigr)
          + \sqrt{1 - \alpha_t}\, z, \qquad \alpha_t = \gamma_t / \gamma_{t-1} = \frac{1 + s_{t-1}^2}{1 + s_t^2},

is, divided by :math:`\sqrt{\gamma_{t-1}}` and in the units of x, with D the denoised image,

.. math:: x \leftarrow x + (\sigma_t^2 - \sigma_{t-1}^2)\, \nabla \log p_{\sigma_t}(x) + \sqrt{v}\, z
          = D + \frac{\sigma_{t-1}^2}{\sigma_t^2} (x - D) + \sqrt{v}\, z.

The mean is that of the next state given the denoised image. The noise is either of DDPM's two:

=======  ===================================================  ==================================================
noise    v                                                    exact, whatever the steps, for data that are
=======  ===================================================  ==================================================
"large"  (sigma_t^2 - sigma_{t-1}^2) alpha_t                  of unit variance in the units of s
"small"  (sigma_t^2 - sigma_{t-1}^2) sigma_{t-1}^2/sigma_t^2  a point
=======  ===================================================  ==================================================

The two are one where steps are small. With r the ratio of two levels, the large one leaves noise of variance
:math:`r^2 + r^{-2} - 1` times what is due at the quiet levels of few steps, 1.2 at r = 1.25; the small one is right
there, but data of a wide Gaussian come out too narrow. The small one is Song et al.'s ancestral predictor, without its
corrector, and on a geometric ladder also the consistent step of ``AnnealedLangevinSampler``.

References:
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Alg. 2 and Sec. 3.2.
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826, Alg. 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule, own, own_schedule
from scorematch.sampling.restoration import Restoration, Restore
from scorematch.sampling.sampler import Precision, Sampler

Noise = Literal["large", "small"]
_LEVELS = 100


class AncestralSampler(Sampler):
    """DDPM's and Palette's sampler, on any score: one call of the network for each level.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet or any callable.
        schedule: the ladder that the chain descends; None is the network's, respaced to ``levels``. It need not be the
            ladder of training.

        Rarely needed:

        levels: to how many levels the ladder is respaced; None is 100 for a network's own ladder if it has more, and
            takes a given one as it is.
        variance: "large" or "small", that of DDPM's two.
        denoise: whether to end with one step of Tweedie's formula at the quietest level, as both papers do.
        clamp: whether to clamp the result to the network's value range, if it has one.
        restore: how an observation is held to: "replace" (an operator without a gain is guided), "guide" or
            "guide-jacobian"; see ``scorematch.sampling.restoration``.
        precision: as for ``AnnealedLangevinSampler``, and so is ``compile``.

    The large variance refers to images in [-1, 1], for which a network's ``value_range`` has the factor. A plain
    callable, and a network of data without a range, is taken to be in those units: of deviation one at most.

    Raises:
        TypeError, ValueError: for a ladder that is missing, levels below 2, or a variance of another name.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution, perturbed
        ...     return -x / (1 + sigma**2)
        >>> AncestralSampler(score, NoiseSchedule.geometric(50, 0.01, 50))
        AncestralSampler(50 levels 50 -> 0.01, large variance, 50 network calls)
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule | None = None,
        *,
        levels: int | None = None,
        variance: Noise = "large",
        denoise: bool = True,
        clamp: bool = True,
        restore: Restore = "replace",
        precision: Precision = "auto",
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        if schedule is None:
            schedule = own_schedule(net)
            if schedule is not None and levels is None:
                levels = min(_LEVELS, len(schedule))
        super().__init__(
            net, schedule, denoise=denoise, clamp=clamp, restore=restore, precision=precision, compile=compile
        )
        if levels is not None:
            self.schedule = self.schedule.respaced(levels)
        if variance not in get_args(Noise):
            raise ValueError(f'variance must be "large" or "small", got {variance!r}.')
        self.variance = variance

    def __len__(self) -> int:
        return len(self.schedule) - 1 + self.denoise

    def _settings(self) -> list[str]:
        return [f"{self.variance} variance"]

    def _chain(
        self,
        x: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[Tensor], Tensor],
        seen: Restoration,
    ) -> Iterator[tuple[Tensor, float]]:
        value_range = own(self.net, "value_range")
        k = 1.0 if value_range is None else 2 / (value_range[1] - value_range[0])
        ladder = self._ladder(x)
        for level, (sigma, following) in enumerate(zip(self.schedule, list(self.schedule)[1:], strict=False)):
            z = noise(x)
            x = seen.project(x, sigma, z)
            x = ancestral_step(x, score(x, ladder[level]), z, sigma, following, self.variance, k)
            self._check_finite(x, level)
            yield x, following


def ancestral_step(
    x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float, variance: Noise = "large", k: float = 1.0
) -> Tensor:
    """One step from a noise level to the following, quieter one.

    Args:
        x: the state at ``sigma``.
        score: of x, there.
        z: standard normal noise of x's shape.
        sigma: the noise level, in the units of x.
        following: the next one, from 0 to sigma.
        variance: "large" or "small".
        k: the ratio of the units of images in [-1, 1] to those of x: 2 for images in [0, 1].
    """
    drift = sigma**2 - following**2
    share = (1 + (k * following) ** 2) / (1 + (k * sigma) ** 2) if variance == "large" else (following / sigma) ** 2
    return torch.add(x, score, alpha=drift).add_(z, alpha=math.sqrt(drift * share))
