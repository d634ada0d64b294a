r"""Predictor-corrector sampling: a predictor step to each lower level, and Langevin steps there as the corrector.

The **predictor** is a step of the reverse diffusion from one level to the next,

.. math:: x \leftarrow x + (\sigma_{i-1}^2 - \sigma_i^2)\, s(x, \sigma_{i-1}) + \sqrt{v_i}\, z, \qquad
          v_i = \sigma_{i-1}^2 - \sigma_i^2 \quad\text{or}\quad
          v_i = \sigma_i^2 (\sigma_{i-1}^2 - \sigma_i^2) / \sigma_{i-1}^2 .

The first :math:`v_i` ("reverse-diffusion") discretizes the stochastic differential equation. The second ("ancestral")
is exact if the denoised image does not change: the noise that is left has variance :math:`\sigma_i^2`. In this case the
first leaves noise whose variance is larger by a factor of :math:`1 + (1 - r^2)^2 / r^2`, where r is the ratio of the
two levels: about 1 for 1,000 levels, and 1.1 for 50.

The **corrector** is a Langevin step at the level, with a step size that gives the signal-to-noise ratio rho,

.. math:: x \leftarrow x + \epsilon\, s(x, \sigma_i) + \sqrt{2\epsilon}\, z, \qquad
          \epsilon = 2 \rho^2 D / \lVert s(x, \sigma_i) \rVert^2 ,

computed for each image; D is the number of values of an image. The mean of :math:`\lVert s \rVert^2 / D` is the mean
curvature of the negative log-density, so the step size adapts to the density. Where noise dominates, it is
:math:`2 \rho^2 \sigma_i^2`. D is the mean of :math:`\lVert z \rVert^2` and replaces it, as Song et al. advise for small
batches. The score of an image with few values can be near zero by chance; epsilon is therefore limited to
:math:`\sigma_i^2`. Since the step size depends on the state, the corrector is exact only for data of many values: on
200 levels, samples of a standard normal distribution have the variance 1.73 with one value, 1.35 with two, 1.08 with
eight and 1.02 with 64.

The **authors' code** (``published``) differs in two points. The corrector begins at the highest level, before the first
predictor step. And its step size is the same for all images of a batch and has no limit,

.. math:: \epsilon = 2 \rho^2 \bigl( \overline{\lVert z \rVert} / \overline{\lVert s(x, \sigma_i) \rVert} \bigr)^2 ,

where the bars are means over the batch. The samples of one batch then depend on each other: a sample changes with the
number of samples and with their seeds.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Alg. 2 and 4, App. E to G.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.batches import per_image
from scorematch.core.schema import Field
from scorematch.core.scores import Score
from scorematch.noise import NoiseSchedule
from scorematch.sampling.ancestral import ancestral_step
from scorematch.sampling.chain import Chain
from scorematch.sampling.sampler import Sampler, SamplerOptions, own_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PredictorCorrectorSampler"]


Predictor = Literal["ancestral", "reverse-diffusion"]


class PredictorCorrectorSampler(Sampler):
    """Predictor-corrector sampling for any score: a step to each lower level, and Langevin steps there.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x: a ScoreNet, its inference copy, or any callable.
        schedule: the noise levels, from high to low; None uses the network's own. Without levels and without the next
            four options, the stored settings of this kind are used, if the network has any.
        predictor: the variance of the noise of a predictor step, "ancestral", the default, or "reverse-diffusion"; see
            ``scorematch.sampling.predictor_corrector``.
        corrector_steps: Langevin steps after each predictor step, by default 1; 0 disables the corrector. For data of
            fewer than about 20 values pass 0, or ``published=True``: the step size for each sample makes the variance
            too large.
        snr: the corrector's signal-to-noise ratio rho, above 0 and below 1, by default 0.16, as for CIFAR-10.
        published: whether to take the corrector steps of the authors' code, with norms that are averaged over the n
            samples of a call, and also at the highest level. It is off by default because the samples of one call then
            depend on each other, even if each has its own generator. With ``predictor="reverse-diffusion"`` the sampler
            is the one of the published results for variance-exploding networks.
        **options: the options of every ``Sampler``: ``levels``, ``sigma_max``, ``sigma_min``, ``denoise``, ``clamp``,
            ``restore``, ``precision`` and ``compile``.

    Raises:
        TypeError: if an argument has the wrong type, or an option does not exist.
        ValueError: if an option has an invalid value, or a plain function has no schedule.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # the score of a standard normal distribution with added noise
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
        predictor: Annotated[
            Predictor | None,
            Field(str, choices=get_args(Predictor)),
            "the step to the next level; ancestral without stored settings",
        ] = None,
        corrector_steps: Annotated[
            int | None,
            Field(int, low=0, high=1_000_000),
            "the number of Langevin steps at each level; 1 without stored settings",
        ] = None,
        snr: Annotated[
            float | None,
            Field(float, above=0, below=1),
            "the signal-to-noise ratio of these steps, above 0 and below 1; 0.16 without stored settings",
        ] = None,
        published: Annotated[
            bool | None,
            Field(bool),
            "the corrector of the authors' code: also at the highest level, with one step size for all images of a "
            "call, which then depend on each other",
        ] = None,
        **options: Unpack[SamplerOptions],
    ) -> None:
        own = own_options(net, "predictor-corrector", options, schedule, predictor, corrector_steps, snr, published)
        if own is not None:
            PredictorCorrectorSampler.__init__(self, net, **{"predictor": "ancestral", **own})
            return
        predictor, snr = predictor or "ancestral", 0.16 if snr is None else snr
        super().__init__(net, schedule, **options)
        self.check_options({"predictor": predictor, "snr": snr})
        self.predictor = predictor
        self.corrector_steps = check_count("corrector_steps", 1 if corrector_steps is None else corrector_steps, 0)
        self.snr = float(snr)
        self.published = bool(published)

    def __len__(self) -> int:
        steps = len(self.schedule) - 1
        return steps + (steps + self.published) * self.corrector_steps + self.denoise

    def settings(self) -> list[str]:
        """The predictor, the number and the kind of corrector steps, and the signal-to-noise ratio."""
        steps, kind = self.corrector_steps, "published " if self.published else ""
        corrector = [f"{steps} {kind}corrector step{'s' if steps > 1 else ''}", f"snr {self.snr:.3g}"] if steps else []
        return [self.predictor, *corrector]

    def steps(self, x: Tensor, chain: Chain) -> Iterator[tuple[Tensor, float]]:
        """Yields the state after each predictor step and each corrector step, with its level."""
        predict = _PREDICTORS[self.predictor]
        for _ in range(self.corrector_steps if self.published else 0):
            x = self._correct(x, chain, self.schedule.sigma_max)
            yield x, self.schedule.sigma_max
        for higher, sigma in itertools.pairwise(self.schedule):
            x, score, z = chain(x, higher)
            x = predict(x, score, z, higher, sigma)
            yield x, sigma
            for _ in range(self.corrector_steps):
                x = self._correct(x, chain, sigma)
                yield x, sigma

    def _correct(self, x: Tensor, chain: Chain, sigma: float) -> Tensor:
        """The state after one Langevin step at a level."""
        x, score, z = chain(x, sigma)
        if self.published:
            noise_norm, score_norm = (values.reshape(len(x), -1).norm(dim=1).mean() for values in (z, score))
            epsilon = 2 * (self.snr * noise_norm / score_norm) ** 2
        else:
            # Division by the mean square of the score over an image; if it is 0, the clamp gives the largest step.
            epsilon = (2 * self.snr**2 / score.reshape(len(x), -1).square().mean(1)).clamp(max=sigma**2)
        score, z = chain.stay(x, score, z, sigma)
        return x + per_image(epsilon, x) * score + per_image((2 * epsilon).sqrt(), x) * z


def _reverse_diffusion(x: Tensor, score: Tensor, z: Tensor, sigma: float, sigma_next: float) -> Tensor:
    step = sigma**2 - sigma_next**2
    return torch.add(x, score, alpha=step).add_(z, alpha=math.sqrt(step))


_PREDICTORS: dict[str, Callable[..., Tensor]] = {
    "ancestral": partial(ancestral_step, variance="small"),
    "reverse-diffusion": _reverse_diffusion,
}
