r"""Diagnostics of a score by noise level: its error against a known score, its loss, its norm, and its denoised images.

**The error of a score.** If the exact score s* is known (see ``scorematch.evaluation.exact``), the denoising loss of a
score s exceeds its minimum by the mean square of the error. In units in which a score of zero has a loss of 1,

.. math:: E(\sigma) = \tfrac{1}{D} \mathrm{E} \lVert \sigma s - \sigma s^* \rVert^2 = L(\sigma) - L^*(\sigma),

and :math:`\sigma^2 E` is the mean square difference of the denoised images. Divided by the mean square of
:math:`\sigma s^*`, it is the relative error.

**Loss and norm.** Without a known score, the loss L of real images shows at which levels a network is better or worse
than another. The mean square N of :math:`\sigma s` shows whether the norm is right: for the exact score
:math:`N + L = 1` at every level. A sum above 1 means that the score is too large, as it is for a network that overfits.
A sum below 1 means that it is too small. A loss of training images below that of held-out images shows overfitting.

**Slope and bias.** At high levels the loss and the norm hardly depend on the network: they are in units of the noise,
which is far larger than the image. The denoised image :math:`d = x + \sigma z + \sigma^2 s` is in the units of x. Over
all values of all images, the line that predicts x from d has the slope

.. math:: \frac{\mathrm{Cov}(x, d)}{\mathrm{Var}(d)} ,

which is 1 for the exact score at every level, since then :math:`d = \mathrm{E}[x | x + \sigma z]`. The bias, the mean
of d - x, is 0. A slope below 1 means that the denoised images differ too much from their mean, in part by error, and a
slope above 1 that they differ too little. Few training images get the highest levels of a log-normal distribution, and
there a network may be wrong although its loss is low.

References:
    Song & Ermon, 2019, arXiv:1907.05600, Eq. 5-6. Vincent, 2011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scorematch.core.conditions import class_of_each
from scorematch.core.derived import isotropic
from scorematch.core.precision import exact_float32
from scorematch.core.processes import process_group
from scorematch.core.randomness import as_generator, seed_of, standard_normal
from scorematch.core.scores import Score, device_of, evaluating, noise_ratios, score_at
from scorematch.data.images import open_images
from scorematch.evaluation.distribution import Distribution
from scorematch.evaluation.estimate import Estimate, Report, mean_of, ratio_of
from scorematch.evaluation.per_image import ConditionChoice, ImageBatch, choose, values_per_image
from scorematch.evaluation.rows import double
from scorematch.loss import scaled_score
from scorematch.noise import NoiseSchedule, schedule_of

_LEVELS = 16


class ScoreError(NamedTuple):
    """The error of a score at one noise level. The errors are standard errors over the samples.

    Attributes:
        sigma: the noise level.
        excess: E, the mean square of sigma times the error, divided by D; the excess of the loss over its minimum.
        relative: E divided by the mean square of sigma times the known score.
        denoised: the root mean square difference of the denoised images, in the units of x.
    """

    sigma: float
    excess: Estimate
    relative: Estimate
    denoised: float


class LevelLoss(NamedTuple):
    """The loss of a network at one noise level. The errors are standard errors over the images.

    Attributes:
        sigma: the noise level.
        loss: the denoising loss divided by D/2; 1 for a score of zero.
        norm: the mean square of sigma times the score; 1 - loss for the exact score.
        calibration: loss + norm - 1, which is 0 for the exact score.
        denoised: the root mean square error of the denoised images, in the units of x.
        slope: the slope of the line that predicts x from the denoised images; 1 for the exact score.
        bias: the mean difference between the denoised images and x, in the units of x; 0 for the exact score.
    """

    sigma: float
    loss: Estimate
    norm: Estimate
    calibration: Estimate
    denoised: float
    slope: Estimate
    bias: Estimate


def score_error(
    score: Score,
    exact: Distribution,
    levels: NoiseSchedule | Iterable[float] | None = None,
    *,
    x: Tensor | None = None,
    n: int = 1024,
    condition: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Report[ScoreError]:
    """Measures the error of a score against the known score of a distribution, at each noise level.

    Both are evaluated at samples of the distribution with noise; the noise of a sample is the same at all levels. Under
    ``torchrun`` or ``accelerate launch`` every process must call it, and each computes a share.

    Args:
        score: a score: a ScoreNet, or any callable ``score(x, sigma)``.
        exact: the distribution with the known score, such as ``Gaussian``, ``GaussianMixture`` or ``Empirical``.
        levels: the noise levels, descending or in any order; None is 16 geometric levels over the range of the score's
            own schedule, or that of ``exact``.
        x: clean samples (n, ...) at which the scores are compared; None draws n samples from the distribution.
        n: the number of samples that are drawn, at least 2.
        condition: the class of all samples, for a network with classes.
        batch_size: the number of samples in a network call.
        seed: the seed of the samples and of the noise.
        progress: whether to show a progress bar.

    Returns:
        One row for each level.

    Raises:
        ValueError: if there are no levels, or fewer than two samples.

    Example:
        >>> from scorematch.evaluation.exact import Gaussian
        >>> exact = Gaussian([0.0, 0.0], 1.0)  # sigma s* = -sigma x / (1 + sigma^2)
        >>> [row] = score_error(lambda x, sigma: 1.1 * exact(x, sigma), exact, [1.0], n=100, progress=False)
        >>> round(row.relative.value, 6)
        0.01
    """
    sigmas = _sigmas(levels, score, exact)
    drawn = exact.sample(n, seed_of(seed, "samples")) if x is None else x
    if len(drawn) < 2:
        raise ValueError(f"a standard error needs at least 2 samples, got {len(drawn)}.")

    if isotropic(score) is not score:
        raise ValueError(
            "score must have the same noise in all channels, like exact, but that of this network is relative to the "
            "deviation of each channel. Train on data whose channels have the same deviation."
        )

    def squares(batch: ImageBatch, clean: Tensor, z: Tensor, sigma: float) -> Sequence[Tensor]:
        noisy = clean + sigma * z
        level = torch.full((len(clean),), sigma, dtype=clean.dtype, device=clean.device)
        known = exact(noisy, level)
        error = score_at(score, noisy, level, class_of_each(condition, noisy)) - known
        return [double(sigma * each).square() for each in (error, known)]

    found = _by_level(
        squares,
        score,
        sigmas,
        # Equal samples, which Empirical draws, need different noise.
        lambda batch: [seed_of(seed, "noise", i) for i in batch.indices.tolist()],
        read=lambda rows: (drawn[rows].cpu(), None),
        indices=torch.arange(len(drawn), device="cpu"),
        batch_size=batch_size,
        title="score error",
        progress=progress,
    )
    rows = []
    for sigma, (error, known) in zip(sigmas, found, strict=True):
        excess = mean_of(error)
        rows.append(ScoreError(sigma, excess, ratio_of(error, known), sigma * math.sqrt(excess.value)))
    return Report(rows)


def level_losses(
    net: Score,
    data: Any,
    levels: NoiseSchedule | Iterable[float] | None = None,
    *,
    n: int | None = 1024,
    condition: ConditionChoice = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Report[LevelLoss]:
    """Measures the loss of a network, the norm of its score and its denoised images, at each noise level.

    The noise of an image depends on ``seed`` and on its content, and is the same at all levels; that of equal images
    differs. Under ``torchrun`` or ``accelerate launch`` every process must call it, and each computes a share.

    Args:
        net: a score: a ScoreNet, or any callable ``net(x, sigma)``.
        data: an ``ImageData``, or what ``scorematch.data.open_images`` takes: a folder, arrays, a data set.
        levels: the noise levels; None is 16 geometric levels over the range of the network's own schedule.
        n: the largest number of images, at least 2, which are drawn at random; None is all.
        condition: the condition of the images, as for ``data_likelihood``.
        batch_size: the number of images in a network call.
        seed: the seed of the choice of images and of the noise.
        progress: whether to show a progress bar.

    Returns:
        One row for each level.

    Raises:
        OSError, TypeError: as ``open_images``.
        ValueError: as ``open_images``; also if there are no levels, or n is below 2.
    """
    sigmas = _sigmas(levels, net)
    images = open_images(data, progress=progress)

    def columns(batch: ImageBatch, clean: Tensor, z: Tensor, sigma: float) -> Sequence[Tensor]:
        given = batch.condition(condition, clean.device)
        scaled, wrong = map(double, scaled_score(net, clean, sigma=sigma, noise=z, condition=given))
        error = sigma * noise_ratios(net, wrong) * wrong
        denoised = double(clean) + error
        return wrong.square(), scaled.square(), error, error.square(), denoised, denoised.square(), denoised * error

    found = _by_level(
        columns,
        net,
        sigmas,
        lambda batch: batch.seeds(seed, "noise"),
        read=images.read,
        indices=choose(len(images), n if n is None else min(n, len(images)), seed),
        batch_size=batch_size,
        title="loss by level",
        progress=progress,
    )
    rows = []
    for sigma, (loss, norm, error, wrong, mean, square, product) in zip(sigmas, found, strict=True):
        center, bias, denoised = float(mean.mean()), mean_of(error), math.sqrt(float(wrong.mean()))
        # Cov(x, d) / Var(d) = 1 - Cov(d - x, d) / Var(d), of all values; each image has its part of the two sums.
        covariance = product - center * error - bias.value * mean + center * bias.value
        excess = ratio_of(covariance, square - 2 * center * mean + center**2)
        slope = Estimate(1 - excess.value, excess.error)
        rows.append(LevelLoss(sigma, mean_of(loss), mean_of(norm), mean_of(loss + norm - 1), denoised, slope, bias))
    return Report(rows)


def _by_level(
    columns: Callable[[ImageBatch, Tensor, Tensor, float], Sequence[Tensor]],
    score: Score,
    sigmas: Sequence[float],
    seeds: Callable[[ImageBatch], list[int]],
    **options: Any,
) -> Tensor:
    """The means over each image of several values at each level, (levels, values, images), over all processes.

    Args:
        columns: computes the values (b, ...) of a batch, of its clean images, their noise z and the level.
        score: the score, which is evaluated in eval mode.
        sigmas: the levels.
        seeds: the seeds of the noise of a batch, which is the same at all levels.
        options: arguments of ``values_per_image``.
    """
    device = device_of(score)

    def values(batch: ImageBatch) -> Tensor:
        clean = batch.x.to(device)
        z = standard_normal(clean.shape, as_generator(seeds(batch)), device, clean.dtype)
        found = [value for sigma in sigmas for value in columns(batch, clean, z, sigma)]
        return torch.stack([value.flatten(1).mean(1) for value in found], 1)

    with process_group(device), torch.no_grad(), evaluating(score), exact_float32():
        return values_per_image(values, **options).T.unflatten(0, (len(sigmas), -1))


def _sigmas(levels: NoiseSchedule | Iterable[float] | None, *scores: object) -> list[float]:
    """The noise levels, or 16 geometric ones over the range of the first score with a schedule."""
    if levels is None:
        own = next((found for score in scores if (found := schedule_of(score)) is not None), None)
        if own is None:
            raise ValueError("the score has no noise levels of its own: pass levels.")
        return np.geomspace(own.sigma_max, own.sigma_min, _LEVELS).tolist()
    sigmas = [float(sigma) for sigma in levels]
    if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
        raise ValueError(f"levels must have at least one noise level, all positive and finite, got {sigmas}.")
    return sigmas
