r"""Ancestral sampling: one step from each noise level to the next, as DDPM and Palette do.

DDPM and Palette use scaled states. Let s be sigma in units of images in [-1, 1], and
:math:`\gamma_t = 1 / (1 + s_t^2)`. Their state is :math:`y_t = \sqrt{\gamma_t}\, x_t`, and the output f of their
network is :math:`-s_t` times the score. Palette's Algorithm 2,

.. math:: y_{t-1} = \frac{1}{\sqrt{\alpha_t}} \Bigl( y_t - \frac{1 - \alpha_t}{\sqrt{1 - \gamma_t}} f \Bigr)
          + \sqrt{1 - \alpha_t}\, z, \qquad \alpha_t = \gamma_t / \gamma_{t-1} = \frac{1 + s_{t-1}^2}{1 + s_t^2},

divided by :math:`\sqrt{\gamma_{t-1}}`, becomes in the units of x, with the denoised image D,

.. math:: x \leftarrow x + (\sigma_t^2 - \sigma_{t-1}^2)\, \nabla \log p_{\sigma_t}(x) + \sqrt{v}\, z
          = D + \frac{\sigma_{t-1}^2}{\sigma_t^2} (x - D) + \sqrt{v}\, z.

The mean is that of the next state given the denoised image. DDPM has two fixed choices of the variance v:

========  ===================================================  ====================================================
variance  v                                                    exact with any number of levels for data that are
========  ===================================================  ====================================================
"large"   (sigma_t^2 - sigma_{t-1}^2) alpha_t                  Gaussian, with unit variance in the units of s
"small"   (sigma_t^2 - sigma_{t-1}^2) sigma_{t-1}^2/sigma_t^2  a single point
========  ===================================================  ====================================================

For small steps the two agree. Let r be the ratio of two neighboring levels. At low levels, "large" leaves noise whose
variance is :math:`r^2 + r^{-2} - 1` times that of the level, 1.2 at r = 1.25. There "small" is exact, but with it
samples of a wide Gaussian are too narrow. "small" is the ancestral predictor of Song et al. (2021) without the
corrector; on a geometric schedule it is also the consistent step of ``AnnealedLangevinSampler`` with p = 2.

The networks of Nichol & Dhariwal (2021) predict the variance of each value ("learned"), between the two:

.. math:: \log v = w \log v_{large} + (1 - w) \log v_{small},

where w is the share that the network returns (``ScoreNet.score_and_variance``). As the two variances depend only on the
two levels of a step, this holds for any levels. The authors sample with fewer steps on a subset of the time steps.
Here this is a subset of the network's levels, ``NoiseSchedule([net.schedule[i] for i in indices])``.

References:
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Alg. 2 and Sec. 3.2.
    Nichol & Dhariwal, 2021, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672, Eq. 15.
    Saharia et al., 2022, Palette: Image-to-Image Diffusion Models, arXiv:2111.05826, Alg. 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.derived import ratios_of
from scorematch.core.schema import Field
from scorematch.core.scores import Score, attribute
from scorematch.noise import NoiseSchedule
from scorematch.sampling.chain import Chain
from scorematch.sampling.sampler import Sampler, SamplerOptions, own_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AncestralSampler"]


FixedVariance = Literal["large", "small"]
Variance = Literal["large", "small", "learned"]
_LEVELS = 100


class AncestralSampler(Sampler):
    """The ancestral sampler of DDPM and Palette for any score, with one network call per level.

    The large variance is defined in units of images in [-1, 1]; the sampler converts them with the network's
    ``value_range`` or ``units``. The data of a plain function, or of a network with neither, are assumed to be in these
    units already, with a standard deviation of at most 1.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; None uses the network's own, or 100 levels in the same range if
            it has more. Without levels, ``variance`` and ``clamp_denoised``, the stored settings of this kind are used,
            if the network has any.
        variance: the variance of the noise of a step: "large", the default, "small", or "learned" for a network that
            predicts it; see ``scorematch.sampling.ancestral``.
        clamp_denoised: whether to clamp the denoised image to the network's value range at every step, as the authors
            of DDPM and of improved-diffusion do.
        **options: the options of every ``Sampler``: ``levels``, ``sigma_max``, ``sigma_min``, ``denoise``, ``clamp``,
            ``restore``, ``precision`` and ``compile``.

    Raises:
        TypeError: if an argument has the wrong type, or an option does not exist.
        ValueError: if an option has an invalid value, a plain function has no schedule, the network predicts no
            variance for "learned", or it has no value range for ``clamp_denoised``.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
        ...     return -x / (1 + sigma**2)
        >>> AncestralSampler(score, NoiseSchedule.geometric(50, 0.01, 50))
        AncestralSampler(50 levels 50 -> 0.01, large variance, 50 network calls)
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        variance: Annotated[
            Variance | None,
            Field(str, choices=get_args(Variance)),
            "the variance of the noise of a step; large without stored settings",
        ] = None,
        clamp_denoised: Annotated[
            bool | None, Field(bool), "clamp the denoised image to the range of the network at every step"
        ] = None,
        **options: Unpack[SamplerOptions],
    ) -> None:
        own = own_options(net, "ancestral", options, schedule, variance, clamp_denoised)
        if own is not None:
            AncestralSampler.__init__(self, net, **{"variance": "large", **own})
            return
        variance, clamp_denoised = variance or "large", bool(clamp_denoised)
        self.variance = variance
        super().__init__(net, schedule, **options)
        self.check_options({"variance": variance})
        if variance == "learned" and not attribute(net, "predicts_variance"):
            raise ValueError(
                f"{argument('variance', 'learned')} needs a network that predicts the variance (predicts_variance). "
                'Write "large" or "small".'
            )
        self._range = attribute(net, "value_range")
        if clamp_denoised and self._range is None:
            raise ValueError(f"{argument('clamp_denoised', True)} needs a network with a value_range. Leave it out.")
        self.clamp_denoised = clamp_denoised
        self._k = 1.0 if self._range is None else 2 / (self._range[1] - self._range[0])
        if attribute(net, "units") is not None:
            self._k = attribute(net, "preconditioning").units[0]

    def default_schedule(self, own: NoiseSchedule, levels: int | None) -> NoiseSchedule:
        """The network's own levels, respaced to ``levels``, or by default to 100 if there are more.

        If this leaves wide gaps between low levels, as for a DDPM, it is a geometric schedule, except for the learned
        variance, which belongs to the network's own levels.
        """
        levels = min(_LEVELS, len(own)) if levels is None else levels
        return own.respaced(levels) if self.variance == "learned" else super().default_schedule(own, levels)

    def __len__(self) -> int:
        return len(self.schedule) - 1 + self.denoise

    def settings(self) -> list[str]:
        """The variance, and whether the denoised image is clamped."""
        return [f"{self.variance} variance", *(["clamped denoised images"] if self.clamp_denoised else [])]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each ancestral step, with its level."""
        variance: FixedVariance | Tensor
        for sigma, sigma_next in itertools.pairwise(self.schedule):
            x, z = chain.begin(x, sigma)
            if self.variance == "learned":
                score, variance = chain.score_and_variance(x, sigma)
            else:
                score, variance = chain.score(x, sigma), self.variance
            if self.clamp_denoised:
                ratios = ratios_of(self.net, x)
                denoised = (torch.add(x, score, alpha=sigma**2) * ratios).clamp_(*self._range) / ratios
                score = (denoised - x) / sigma**2
            x = ancestral_step(x, score, z, sigma, sigma_next, variance, self._k)
            yield x, sigma_next


# v / (sigma_t^2 - sigma_{t-1}^2) as a function of s_t and s_{t-1}.
_VARIANCES: dict[FixedVariance, Callable[[float, float], float]] = {
    "large": lambda s, sigma_next: (1 + sigma_next**2) / (1 + s**2),
    "small": lambda s, sigma_next: (sigma_next / s) ** 2,
}


def step_variance(variance: FixedVariance, sigma: float, sigma_next: float, k: float) -> float:
    """The variance of the noise of ``ancestral_step``, in the units of x squared."""
    return (sigma**2 - sigma_next**2) * _VARIANCES[variance](k * sigma, k * sigma_next)


def ancestral_step(
    x: Tensor,
    score: Tensor,
    z: Tensor,
    sigma: float,
    sigma_next: float,
    variance: FixedVariance | Tensor = "large",
    k: float = 1.0,
) -> Tensor:
    """One step from a noise level to the next lower level.

    Args:
        x: the state (n, ...) at ``sigma``.
        score: the score of x at ``sigma``, of x's shape.
        z: standard normal noise of x's shape.
        sigma: the noise level of x, in the units of x.
        sigma_next: the next level, from 0 to ``sigma``, in the units of x; above 0 if the variance is a tensor.
        variance: "large", "small", or the share w of the large variance, a tensor of x's shape.
        k: the factor that converts the units of x to those of images in [-1, 1]: 2 for images in [0, 1].

    Returns:
        The state at ``sigma_next``, of x's shape.
    """
    mean = torch.add(x, score, alpha=sigma**2 - sigma_next**2)
    if isinstance(variance, Tensor):
        large, small = (step_variance(fixed, sigma, sigma_next, k) for fixed in ("large", "small"))
        ratio = torch.exp(variance * (math.log(large / small) / 2))
        return mean.addcmul_(z, ratio, value=math.sqrt(small))
    return mean.add_(z, alpha=math.sqrt(step_variance(variance, sigma, sigma_next, k)))
