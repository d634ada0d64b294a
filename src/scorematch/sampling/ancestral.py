r"""Ancestral sampling: one step from each noise level to the next, as DDPM and Palette do.

Their chains use other coordinates. With :math:`\gamma_t = 1 / (1 + s_t^2)`, s being sigma in the units of images
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

For small steps the two agree. With r the ratio of two levels, the large one leaves noise of variance
:math:`r^2 + r^{-2} - 1` times that of the level where levels are low and few, 1.2 at r = 1.25; the small one is right
there, but samples of a wide Gaussian come out too narrow. The small one is Song et al.'s ancestral predictor, without
its corrector, and on a geometric schedule also the consistent step of ``AnnealedLangevinSampler`` with p = 2.

References:
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Alg. 2 and Sec. 3.2.
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826, Alg. 2.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule
from scorematch.protocol import Score, attribute
from scorematch.sampling.sampler import Sampler, SamplerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Variance = Literal["large", "small"]
_LEVELS = 100


class AncestralSampler(Sampler):
    """DDPM's and Palette's sampler, on any score: one network call per level.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels that the chain descends; None is the network's own, respaced to 100 levels if it has
            more.
        variance: of the noise, "large" or "small": the two of DDPM.
        **options: ``levels``, ``denoise``, ``clamp``, ``restore``, ``precision`` and ``compile``, as for every
            ``Sampler``.

    The large variance refers to images in [-1, 1]; a network's ``value_range`` gives the factor. A plain callable, and
    a network of data without a range, is taken to be in those units: of a standard deviation of at most one.

    Raises:
        TypeError, ValueError: for a schedule that is missing, or an option that is not known.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution with noise
        ...     return -x / (1 + sigma**2)
        >>> AncestralSampler(score, NoiseSchedule.geometric(50, 0.01, 50))
        AncestralSampler(50 levels 50 -> 0.01, large variance, 50 network calls)
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        variance: Variance = "large",
        **options: Unpack[SamplerOptions],
    ) -> None:
        super().__init__(net, schedule, **options)
        if variance not in _VARIANCES:
            raise ValueError(f'variance must be "large" or "small", got {variance!r}.')
        self.variance = variance
        value_range = attribute(net, "value_range")
        self._k = 1.0 if value_range is None else 2 / (value_range[1] - value_range[0])

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The network's own levels, respaced to 100 if there are more."""
        return own.respaced(min(_LEVELS, len(own)) if levels is None else levels)

    def __len__(self) -> int:
        return len(self.schedule) - 1 + self.denoise

    def settings(self) -> list[str]:
        """The variance."""
        return [f"{self.variance} variance"]

    def step(self, x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float) -> Tensor:
        """The ancestral step to the next level."""
        return ancestral_step(x, score, z, sigma, following, self.variance, self._k)


# The share of sigma_t^2 - sigma_{t-1}^2 that is noise, at s_t and s_{t-1}.
_VARIANCES = {
    "large": lambda s, following: (1 + following**2) / (1 + s**2),
    "small": lambda s, following: (following / s) ** 2,
}


def ancestral_step(
    x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float, variance: Variance = "large", k: float = 1.0
) -> Tensor:
    """One step from a noise level to the following, lower one.

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
    share = _VARIANCES[variance](k * sigma, k * following)
    return torch.add(x, score, alpha=drift).add_(z, alpha=math.sqrt(drift * share))
