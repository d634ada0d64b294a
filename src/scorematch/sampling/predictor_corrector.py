r"""Predictor-corrector sampling: a predictor step down to each level, and Langevin steps there as corrector.

The **predictor** is a step of the reverse diffusion from a level to the next,

.. math:: x \leftarrow x + (\sigma_{i-1}^2 - \sigma_i^2)\, s(x, \sigma_{i-1}) + \sqrt{v_i}\, z, \qquad
          v_i = \sigma_{i-1}^2 - \sigma_i^2 \quad\text{or}\quad
          v_i = \sigma_i^2 (\sigma_{i-1}^2 - \sigma_i^2) / \sigma_{i-1}^2 ,

the first discretizing the equation ("reverse-diffusion"), the second being the exact step where the denoised image does
not move ("ancestral"). There the noise that is left has variance :math:`\sigma_i^2`, and that of the first is larger by
a factor of :math:`1 + (1 - r^2)^2 / r^2`, r being the ratio of the two levels: one for a thousand levels, 1.1 for
fifty.

The **corrector** is Langevin's step at the level, of a size that gives the signal-to-noise ratio rho,

.. math:: x \leftarrow x + \epsilon\, s(x, \sigma_i) + \sqrt{2\epsilon}\, z, \qquad
          \epsilon = 2 \rho^2 D / \lVert s(x, \sigma_i) \rVert^2 ,

computed for each image. The mean of :math:`\lVert s \rVert^2 / D` is the mean curvature of the log-density, so the step
is a fixed share of what the density allows; where noise dominates, it is :math:`2 \rho^2 \sigma_i^2`. D replaces
:math:`\lVert z \rVert^2`, whose mean it is, as Song et al. advise for small batches; the authors' code averages both
norms over the batch, so that an image depends on the others. The score of a single image of few values can be near zero
by chance: epsilon is at most :math:`\sigma_i^2`.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Alg. 2 and 4, App. F and G.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule
from scorematch.protocol import Score, per_image
from scorematch.sampling.ancestral import ancestral_step
from scorematch.sampling.sampler import Chain, Sampler, SamplerOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

Predictor = Literal["ancestral", "reverse-diffusion"]


class PredictorCorrectorSampler(Sampler):
    """A step of the reverse diffusion down to each level, and Langevin steps there, on any score.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels that the chain descends; None is the network's own.
        predictor: the noise of the step down, "ancestral" or "reverse-diffusion".
        corrector_steps: Langevin steps after each step down; with 0 there is only the predictor.
        snr: the corrector's signal-to-noise ratio rho, between 0 and 1; Song et al. use 0.16 for CIFAR-10.
        **options: ``levels``, ``denoise``, ``clamp``, ``restore``, ``precision`` and ``compile``, as for every
            ``Sampler``.

    Raises:
        TypeError, ValueError: for a schedule that is missing, an option that is not known, a count below 0, or an snr
            out of its range.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution with noise
        ...     return -x / (1 + sigma**2)
        >>> PredictorCorrectorSampler(score, NoiseSchedule.geometric(50, 0.01, 100))
        PredictorCorrectorSampler(100 levels 50 -> 0.01, ancestral, 1 corrector step, snr 0.16, 199 network calls)

    References:
        Song et al., 2021, arXiv:2011.13456, Alg. 2 and 4.
    """

    def __init__(
        self,
        net: Score,
        schedule: NoiseSchedule | None = None,
        *,
        predictor: Predictor = "ancestral",
        corrector_steps: int = 1,
        snr: float = 0.16,
        **options: Unpack[SamplerOptions],
    ) -> None:
        super().__init__(net, schedule, **options)
        if predictor not in _PREDICTORS:
            raise ValueError(f"predictor must be one of {', '.join(map(repr, _PREDICTORS))}, got {predictor!r}.")
        if not isinstance(corrector_steps, int) or corrector_steps < 0:
            raise ValueError(f"corrector_steps must be an integer of at least 0, got {corrector_steps!r}.")
        if not 0 < snr < 1:
            raise ValueError(f"snr must lie between 0 and 1, got {snr!r}.")
        self.predictor = predictor
        self.corrector_steps = corrector_steps
        self.snr = float(snr)

    def __len__(self) -> int:
        return (len(self.schedule) - 1) * (1 + self.corrector_steps) + self.denoise

    def settings(self) -> list[str]:
        """The predictor, and the corrector's steps and ratio."""
        steps = self.corrector_steps
        corrector = [f"{steps} corrector step{'s' if steps > 1 else ''}", f"snr {self.snr:.3g}"] if steps else []
        return [self.predictor, *corrector]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """The state after each predictor step and each corrector step."""
        predict = _PREDICTORS[self.predictor]
        for higher, sigma in itertools.pairwise(self.schedule):
            x, score, z = chain(x, higher)
            x = predict(x, score, z, higher, sigma)
            yield x, sigma
            for _ in range(self.corrector_steps):
                z = chain.noise(x)
                x = chain.observe(x, sigma, z)
                score = chain.score(x, sigma)
                # The mean of s^2 over an image; zero gives infinity, and so the largest step.
                epsilon = (2 * self.snr**2 / score.reshape(len(x), -1).square().mean(1)).clamp(max=sigma**2)
                score, z = chain.settle(x, score, z, sigma)
                x = x + per_image(epsilon, x) * score + per_image((2 * epsilon).sqrt(), x) * z
                yield x, sigma


def _ancestral(x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float) -> Tensor:
    return ancestral_step(x, score, z, sigma, following, "small")


def _reverse_diffusion(x: Tensor, score: Tensor, z: Tensor, sigma: float, following: float) -> Tensor:
    step = sigma**2 - following**2
    return torch.add(x, score, alpha=step).add_(z, alpha=math.sqrt(step))


_PREDICTORS = {"ancestral": _ancestral, "reverse-diffusion": _reverse_diffusion}
