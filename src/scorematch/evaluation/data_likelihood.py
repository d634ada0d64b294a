r"""The bits per dimension of a data set under a network, with their errors.

The bits per dimension of one image are those of ``scorematch.likelihood.bits_per_dimension``: a bound, which needs a
random dequantization u of the image, an integral over noise levels, and random vectors v for the trace in it. The
figure is the mean over images. It has three errors, which are reported separately:

- **The choice of images.** The standard error over images, the deviation over images divided by the root of their
  number. It contains the random errors of u and v.
- **The estimate of the trace.** For some images the bits are computed again with the same u and other v. Half the mean
  square of the differences is the variance of one estimate; its root divided by the root of the number of images is the
  error of the mean. It falls with more ``probes``.
- **The steps.** For the same images the bits are computed again with twice the steps between the same levels. The
  integration is of second order: with infinitely many levels the bits change by about 4/3 of this change. If it is not
  small compared with the standard error, use more levels.

**Networks whose lowest level is well above 1/255.** Dequantized images have less noise than all images that such a
network was trained on, so the figure depends on its output for images unlike those of training. With
``noise="normal"`` the images get normal noise of the lowest level instead: the model describes the density of such
images. The figure is then the cross-entropy of the noisy images in the same units,
:math:`-\tfrac{1}{D} \mathrm{E} \log_2 p(x + \sigma_{min} z) + \log_2 255`. Its minimum over models is that of the true
density, and it is never below the entropy of the noise, :math:`\log_2(255\, \sigma_{min} \sqrt{2 \pi e})`. It is
comparable only between networks with the same lowest level.

References:
    Song et al., 2021, arXiv:2011.13456, Eq. 39-40; Theis et al., 2016, arXiv:1511.01844, Sec. 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from scorematch.core.arguments import check_choice, check_count
from scorematch.core.precision import exact_float32
from scorematch.core.processes import process_group
from scorematch.core.randomness import as_generator, standard_normal
from scorematch.core.scores import Score, device_of, noise_ratios
from scorematch.data.images import open_images
from scorematch.evaluation.estimate import Estimate, mean_of
from scorematch.evaluation.per_image import ConditionChoice, ImageBatch, choose, values_per_image
from scorematch.likelihood import as_bits, check_unit_range, default_schedule, dequantized, log_likelihood
from scorematch.noise import NoiseSchedule

Noise = Literal["uniform", "normal"]


@dataclass(frozen=True, eq=False)
class DataLikelihood:
    """The bits per dimension of a data set.

    Attributes:
        bits: the mean bits per dimension, and its standard error over images.
        noise: the noise of the images, "uniform" or "normal".
        trace_error: the part of the standard error that comes from the estimate of the trace; 0 for the exact trace.
        change: the mean change of the bits with twice the steps, and its standard error.
        levels: the number of noise levels.
        n: the number of images.
        checked: the number of images for ``trace_error`` and ``change``.
        dimension: D, the number of values in an image.
        per_image: the bits per dimension of each image (n,), float64.
        indices: the indices of these images in the data (n,).
    """

    bits: Estimate
    noise: Noise
    trace_error: float
    change: Estimate
    levels: int
    n: int
    checked: int
    dimension: int
    per_image: Tensor
    indices: Tensor

    @property
    def nats(self) -> Estimate:
        """``bits`` times D log 2: the mean negative log-likelihood of an image in units of gray levels, in nats."""
        return mean_of(self.per_image * (self.dimension * math.log(2)))

    def __str__(self) -> str:
        return (
            f"{self.bits} bits per dimension over {self.n:,} images; the trace contributes an error of "
            f"{self.trace_error:.2g}, and twice the {self.levels} levels change the bits by {self.change}"
        )


def data_likelihood(
    net: Score,
    data: Any,
    schedule: NoiseSchedule | None = None,
    *,
    n: int | None = None,
    noise: Noise = "uniform",
    probes: int | None = 1,
    checks: int = 64,
    condition: ConditionChoice = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> DataLikelihood:
    """Measures the bits per dimension of a data set.

    With L levels the network is called 2 L times for each of the n images, and 6 L times for each image of ``checks``,
    half of the calls with a backward pass. The memory is that of one backward pass with ``batch_size`` images; it does
    not depend on n. Under ``torchrun`` or ``accelerate launch`` every process must call it, and each computes a share
    of the batches.

    The random numbers of an image depend on ``seed`` and on the content of the image; those of equal images differ. The
    result depends neither on the order of the data nor on the number of processes, and on the batch size only through
    rounding.

    Args:
        net: a score of images in [0, 1], differentiable in x: a ScoreNet, or any callable with a schedule.
        data: an ``ImageData``, or what ``scorematch.data.open_images`` takes: a folder, arrays, an ``.npz`` file, a
            data set. The values must be multiples of 1/255 in [0, 1].
        schedule: the noise levels of the integration, as for ``log_likelihood``.
        n: the number of images, at least 2, which are drawn at random; None is all.
        noise: "uniform", the dequantization noise, for bits per dimension; "normal", noise of the lowest level of the
            integration, for networks whose lowest level is well above 1/255 (docs/evaluation.md).
        probes: the number of random vectors for the trace at each level; None computes the exact trace.
        checks: the number of images for the error of the trace and the change with twice the levels, at least 2; at
            most n are used.
        condition: an int, the class of all images; or a function of a batch of images (b, ...) in [0, 1] and their
            labels (b,), or None, that returns the condition (b, ...); write ``lambda images, labels: labels`` for a
            network with classes and data opened with ``labels=True``.
        batch_size: the number of images in a batch.
        seed: the seed of the choice of images and of all random numbers.
        progress: whether to show a progress bar.

    Returns:
        The mean bits per dimension with the three errors, and the bits of each image.

    Raises:
        OSError, TypeError, ValueError: as ``open_images`` and ``log_likelihood``; also a ValueError if the likelihood
            of an image is not finite, or n or ``checks`` is out of range.
    """
    check_count("checks", checks, 2)
    check_choice("noise", noise, get_args(Noise))
    check_unit_range(net)
    images = open_images(data, progress=progress)
    schedule = default_schedule(net) if schedule is None else schedule
    indices, device = choose(len(images), n, seed), device_of(net)
    finer = schedule.respaced(2 * len(schedule) - 1)

    def bits(batch: ImageBatch, levels: NoiseSchedule, repeat: int) -> Tensor:
        generators = batch.seeds(seed, "noise")
        if noise == "uniform":
            x = dequantized(batch.x, generators)
        else:
            z = standard_normal(batch.x.shape, as_generator(generators), batch.x.device, batch.x.dtype)
            x = batch.x + schedule.sigma_min * noise_ratios(net, batch.x) * z
        with exact_float32():
            nats = log_likelihood(
                net,
                x.to(device),
                levels,
                probes=probes,
                condition=batch.condition(condition, device),
                generator=batch.seeds(seed, "trace", repeat),
                progress=False,
            )
        return as_bits(nats, x[0].numel())[:, None]

    def check(batch: ImageBatch) -> Tensor:
        repeated = [] if probes is None else [bits(batch, schedule, 1)]
        return torch.cat([bits(batch, finer, 0), *repeated], 1)

    values = partial(values_per_image, read=images.read, batch_size=batch_size, progress=progress)
    with process_group(device):
        own = values(lambda batch: bits(batch, schedule, 0), indices=indices, title="likelihood")
        checked = values(check, indices=indices[:checks], title="errors of the likelihood")
    own = own[:, 0]
    changes = checked - own[: len(checked), None]
    variance = 0.0 if probes is None else float(changes[:, 1].square().mean()) / 2
    return DataLikelihood(
        bits=mean_of(own),
        noise=noise,
        trace_error=math.sqrt(variance / len(own)),
        change=mean_of(changes[:, 0]),
        levels=len(schedule),
        n=len(own),
        checked=len(checked),
        dimension=math.prod(images.shape),
        per_image=own,
        indices=indices,
    )
