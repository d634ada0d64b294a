r"""Predictor-corrector sampling: each level is entered by a step down, and then corrected by Langevin steps.

The **predictor** is a step of the reverse diffusion from a level to the next,

.. math:: x \leftarrow x + (\sigma_{i-1}^2 - \sigma_i^2)\, s(x, \sigma_{i-1}) + \sqrt{v_i}\, z, \qquad
          v_i = \sigma_{i-1}^2 - \sigma_i^2 \quad\text{or}\quad
          v_i = \sigma_i^2 (\sigma_{i-1}^2 - \sigma_i^2) / \sigma_{i-1}^2 ,

the first discretizing the equation ("reverse-diffusion"), the second being the exact step where the denoised image does
not move ("ancestral"): then the noise that is left has variance :math:`\sigma_i^2`, where the first is too loud by a
factor of :math:`1 + (1 - r^2)^2 / r^2`, r being the ratio of the two levels: nothing for a thousand levels, a tenth for
fifty.

The **corrector** is Langevin's step at the level, of a size that gives the signal-to-noise ratio rho,

.. math:: x \leftarrow x + \epsilon\, s(x, \sigma_i) + \sqrt{2\epsilon}\, z, \qquad
          \epsilon = 2 \rho^2 D / \lVert s(x, \sigma_i) \rVert^2 ,

for every image its own. The mean of :math:`\lVert s \rVert^2 / D` is the mean curvature of the log-density, so the step
is rho's share of what the density allows; where the noise is most of what there is to see, it is
:math:`2 \rho^2 \sigma_i^2`. D stands for :math:`\lVert z \rVert^2`, of which it is the mean, as Song et al. advise for
small batches: the authors' programs average both norms over the batch, and an image then depends on its neighbors. A
single image of few values can have a score near zero by chance: epsilon is at most :math:`\sigma_i^2`.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Alg. 2 and 4, App. F and G.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule, expand
from scorematch.sampling.ancestral import ancestral_step
from scorematch.sampling.restoration import Restoration, Restore
from scorematch.sampling.sampler import Precision, Sampler

Predictor = Literal["ancestral", "reverse-diffusion"]


class PredictorCorrectorSampler(Sampler):
    """A step of the reverse diffusion down to each level, and Langevin steps there, on any score.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet or any callable.
        schedule: the ladder that the chain descends; None is the network's own.
        predictor: the noise of the step down, "ancestral" or "reverse-diffusion".
        corrector_steps: Langevin steps after each step down; 0 leaves the predictor alone.
        snr: the corrector's signal-to-noise ratio rho, between 0 and 1; Song et al. take 0.16 for CIFAR-10.

        Rarely needed:

        denoise: whether to end with one step of Tweedie's formula at the quietest level.
        clamp: whether to clamp the result to the network's value range, if it has one.
        restore: how an observation is held to, as for ``AnnealedLangevinSampler``.
        precision: as for ``AnnealedLangevinSampler``, and so is ``compile``.

    Raises:
        TypeError, ValueError: for a ladder that is missing, a predictor that there is not, a count below 0, or an snr
            out of its range.

    Example:
        >>> import torch
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution, perturbed
        ...     return -x / (1 + sigma**2)
        >>> PredictorCorrectorSampler(score, NoiseSchedule.geometric(50, 0.01, 100))
        PredictorCorrectorSampler(100 levels 50 -> 0.01, ancestral, 1 corrector step, snr 0.16, 199 network calls)

    References:
        Song et al., 2021, arXiv:2011.13456, Alg. 2 and 4.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        schedule: NoiseSchedule | None = None,
        *,
        predictor: Predictor = "ancestral",
        corrector_steps: int = 1,
        snr: float = 0.16,
        denoise: bool = True,
        clamp: bool = True,
        restore: Restore = "replace",
        precision: Precision = "auto",
        compile: bool = False,  # noqa: A002  (torch's word)
    ) -> None:
        super().__init__(
            net, schedule, denoise=denoise, clamp=clamp, restore=restore, precision=precision, compile=compile
        )
        if predictor not in get_args(Predictor):
            known = ", ".join(map(repr, get_args(Predictor)))
            raise ValueError(f"predictor must be one of {known}, got {predictor!r}.")
        if not isinstance(corrector_steps, int) or corrector_steps < 0:
            raise ValueError(f"corrector_steps must be an integer of at least 0, got {corrector_steps!r}.")
        if not 0 < snr < 1:
            raise ValueError(f"snr must lie between 0 and 1, got {snr!r}.")
        self.predictor = predictor
        self.corrector_steps = corrector_steps
        self.snr = float(snr)

    def __len__(self) -> int:
        return (len(self.schedule) - 1) * (1 + self.corrector_steps) + self.denoise

    def _settings(self) -> list[str]:
        steps = self.corrector_steps
        corrector = [f"{steps} corrector step{'s' if steps > 1 else ''}", f"snr {self.snr:.3g}"] if steps else []
        return [self.predictor, *corrector]

    def _chain(
        self,
        x: Tensor,
        score: Callable[[Tensor, Tensor], Tensor],
        noise: Callable[[Tensor], Tensor],
        seen: Restoration,
    ) -> Iterator[tuple[Tensor, float]]:
        ladder = self._ladder(x)
        for level in range(1, len(self.schedule)):
            louder, sigma = self.schedule[level - 1], self.schedule[level]
            z = noise(x)
            x = seen.project(x, louder, z)
            gradient = score(x, ladder[level - 1])
            if self.predictor == "ancestral":
                x = ancestral_step(x, gradient, z, louder, sigma, "small")
            else:
                step = louder**2 - sigma**2
                x = torch.add(x, gradient, alpha=step).add_(z, alpha=math.sqrt(step))
            yield x, sigma
            for _ in range(self.corrector_steps):
                z = noise(x)
                x = seen.project(x, sigma, z)
                gradient = score(x, ladder[level])
                # The mean of s^2 over an image; one that is zero gives infinity, and so the greatest step.
                epsilon = (2 * self.snr**2 / gradient.reshape(len(x), -1).square().mean(1)).clamp(max=sigma**2)
                gradient, z = seen.settle(x, gradient, z, sigma)
                x = x + expand(epsilon, x) * gradient + expand((2 * epsilon).sqrt(), x) * z
                yield x, sigma
            self._check_finite(x, level)
