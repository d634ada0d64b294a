r"""The log-likelihood of data under a score network, by integration of the probability flow.

The probability flow is the ODE :math:`dx/d\sigma = -\sigma s(x, \sigma)`. It transports the density of data with noise
of the lowest level to the highest level, where the density is nearly normal. With the change of volume along the path,

.. math:: \log p(x) = \log \mathcal{N}(x_{max};\, m, \sigma_{max}^2 I)
          + D \log\frac{\sigma_{max}}{\sigma_{min}}
          - \int_{\sigma_{min}}^{\sigma_{max}} \mathrm{tr}\, \frac{\partial \hat x}{\partial x}\, d\log\sigma ,

where D is the number of values in x, :math:`\hat x = x + \sigma^2 s` the denoised image, and m the middle of the
network's value range. The path is computed with Heun's method in sigma, and the integral of the trace with the
trapezoidal rule in log sigma; both are of second order in the step. The trace is either exact, from D derivatives,
which is affordable for data of few dimensions, or estimated as
:math:`\mathrm{E}\, v^\top (\partial \hat x/\partial x)\, v` (Hutchinson), with one derivative for each random vector v
of signs, 1 or -1. New vectors are drawn at each level.

**What is measured.** The result is the density at sigma_min of the model, the distribution into which the flow
transforms the normal distribution at sigma_max. Different networks can be compared by it. It is a density of data
*with noise* of level sigma_min. Even for an exact score it differs from the density of the noisy data, since data with
noise of level sigma_max are not exactly normal: the mean of log p over the data is then too low, by at most
:math:`\mathrm{E}\lVert x_0 - m \rVert^2 / 2\sigma_{max}^2` nats. For MNIST and sigma_max = 16.9 that is a third of a
nat per image, 0.0006 bits per dimension.

**Bits per dimension.** The values of an 8-bit image are multiples of 1/255. With uniform noise of width 1/255 added to
each value, images have a density p, and

.. math:: -\log_2 P(\mathrm{image}) \le -\mathrm{E}_u \log_2 p\bigl(x + (u - \tfrac12)/255\bigr) + D \log_2 255,
          \qquad u \sim \mathcal{U}[0, 1]^D .

The right side divided by D is the number of bits per value that a lossless code of the images needs. The density
includes noise of level sigma_min; therefore even a value that an exact score predicts with certainty takes
:math:`\log_2(255 \sigma_{min} \sqrt{2\pi})` bits, 2.7 at 0.01 and 0.4 at 0.002. If sigma_min is well above 1/255, the
network was not trained on images as clean as these. The result is still valid for the model's density, but it depends
on the network outside its training data, and it needs many levels. To compare networks, use :math:`-\log p` of images
with noise of level sigma_min: its mean is smallest for the true density and never below the entropy of the noise.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 39-40.
    Grathwohl et al., 2019, FFJORD, arXiv:1810.01367 (Hutchinson's estimate along a flow).
    Theis et al., 2016, A Note on the Evaluation of Generative Models, arXiv:1511.01844 (dequantization).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.core.arguments import check_count
from scorematch.core.batches import check_data, without_history
from scorematch.core.conditions import class_of_each, map_parts
from scorematch.core.derived import isotropic, ratios_of
from scorematch.core.precision import without_autocast
from scorematch.core.randomness import Generator, as_generator, standard_normal, uniform
from scorematch.core.scores import Given, Score, attribute, check_differentiable, evaluating, middle_of, score_at
from scorematch.noise import NoiseSchedule, check_schedule, schedule_of

__all__ = ["bits_per_dimension", "log_likelihood"]

_LEVELS = 50


def log_likelihood(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    probes: int | None = 1,
    condition: Given = None,
    generator: Generator = None,
    progress: bool = True,
) -> Tensor:
    """Computes the log-density of data under the probability flow of a score network, in nats.

    It calls the network twice per level, once with ``probes`` backward passes. Samples are independent of each other,
    so that a large data set can be passed in parts.

    Args:
        net: a score: a ScoreNet, or any callable ``net(x, sigma)`` that returns a tensor of x's shape and is
            differentiable in x.
        x: the data (N, ...), floating point; images in [0, 1].
        schedule: the noise levels of the integration. At the highest the density is assumed to be normal; at the lowest
            the density of x is computed. None is ``NoiseSchedule.karras`` with 50 levels over the range of the
            network's own schedule.

        Rarely needed:

        probes: the number of random vectors for the estimate of the trace at each level, at least 1; None computes the
            exact trace with D derivatives.
        condition: passed to the network as its third argument: a tensor (N, ...), or an int, the class of all samples.
        generator: the source of the random vectors: a ``torch.Generator``, or a seed; None is torch's global generator.
            A list holds one for each sample.
        progress: whether to show a progress bar.

    Returns:
        log p (N,), in x's dtype, but at least float32, without gradient.

    Raises:
        TypeError: if x is not a floating-point tensor, or ``probes`` is not an integer.
        ValueError: if x is not a batch, ``probes`` is below 1, the schedule has one level, or is missing for a plain
            function or a network with one noise level, or the score is not differentiable in x.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution in two dimensions, with noise
        ...     return -x / (1 + sigma**2)
        >>> schedule = NoiseSchedule.karras(100, 0.01, 100)
        >>> log_likelihood(score, torch.zeros(1, 2), schedule, probes=None, progress=False)  # -log(2 pi) = -1.8379
        tensor([-1.837...])

    References:
        Song et al., 2021, arXiv:2011.13456, Eq. 39.
    """
    check_data(x)
    probes = None if probes is None else check_count("probes", probes)
    schedule = default_schedule(net) if schedule is None else schedule
    check_schedule(schedule)
    if len(schedule) == 1:
        raise ValueError(f"schedule must have at least two levels, the ends of the flow, got {schedule!r}.")
    generators = as_generator(generator)
    dimension = x[0].numel()
    net = isotropic(net)
    # Neither computations in inference mode nor tensors created in it can be differentiated.
    with torch.inference_mode(False), torch.no_grad(), without_autocast(), evaluating(net):
        x = without_history(x).to(torch.promote_types(x.dtype, torch.float32))
        x = x / ratios_of(net, x)  # the product of the ratios is 1, and with it the change of volume
        condition = class_of_each(condition, x)
        condition = map_parts(without_history, condition)
        flow = _Flow(net, condition, probes, generators)
        end, integral = _follow(flow, x, schedule, progress)
        squares = ((end - middle_of(net, end)) / schedule.sigma_max).square().flatten(1).sum(1)
        normal = -squares / 2 - dimension * math.log(schedule.sigma_max * math.sqrt(2 * math.pi))
        return normal + dimension * math.log(schedule.sigma_max / schedule.sigma_min) - integral


def bits_per_dimension(
    net: Score,
    images: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    probes: int | None = 1,
    condition: Given = None,
    generator: Generator = None,
    progress: bool = True,
) -> Tensor:
    r"""Computes the bits per dimension of 8-bit images: the bits per value of a lossless code with the model's density.

    .. math:: -\frac{1}{D} \log_2 p\bigl(x + (u - \tfrac12) / 255\bigr) + \log_2 255

    where u is uniform in [0, 1), drawn once for each value of each image. In the mean over u this is an upper bound of
    the bits per dimension of the discrete images. It cannot fall below a limit that the lowest noise level sets; see
    the module docstring.

    Args:
        net: a score, as for ``log_likelihood``, of images in [0, 1].
        images: (N, ...), floating point, multiples of 1/255 in [0, 1].
        schedule: the noise levels of the integration, as for ``log_likelihood``.

        Rarely needed:

        probes: the number of random vectors for the trace at each level; None computes the exact trace.
        condition: passed to the network as its third argument, as for ``log_likelihood``.
        generator: the source of u and of the random vectors, as for ``log_likelihood``.
        progress: whether to show a progress bar.

    Returns:
        The bits per dimension (N,) of the images.

    References:
        Theis et al., 2016, arXiv:1511.01844, Sec. 3.1.
    """
    check_unit_range(net)
    generators = as_generator(generator)
    x = dequantized(images, generators)
    nats = log_likelihood(net, x, schedule, probes=probes, condition=condition, generator=generators, progress=progress)
    return as_bits(nats, x[0].numel())


def check_unit_range(net: Score) -> None:
    """Raises ValueError if a score has a value range other than [0, 1], that of ``dequantized`` images."""
    value_range = attribute(net, "value_range")
    if value_range is not None and tuple(value_range) != (0, 1):
        raise ValueError(f"net must be a score of images in [0, 1], but its value_range is {tuple(value_range)}.")


def dequantized(images: Tensor, generator: Generator = None) -> Tensor:
    """The images with uniform noise of width 1/255, the x + (u - 1/2)/255 of ``bits_per_dimension``.

    Args:
        images: (N, ...), floating point, multiples of 1/255 in [0, 1].
        generator: the source of u, as for ``log_likelihood``.

    Returns:
        The noisy images (N, ...), in the dtype of the images, but at least float32.
    """
    check_data(images, "images")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # also true for NaN
        raise ValueError(f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}.")
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    u = uniform(images.shape, as_generator(generator), images.device, images.dtype)
    return images + (u - 0.5) / 255


def as_bits(log_density: Tensor, dimension: int) -> Tensor:
    """The bits per dimension (N,) of 8-bit images from the log-density (N,) of ``dequantized`` images, in nats.

    Args:
        log_density: (N,), in nats.
        dimension: D, the number of values in an image.
    """
    return -log_density / (dimension * math.log(2)) + math.log2(255)


def default_schedule(net: Score) -> NoiseSchedule:
    """The schedule of ``log_likelihood`` if none is given.

    Raises:
        ValueError: for a plain function, which has no noise levels of its own, and for a network with one level.
    """
    own = schedule_of(net)
    if own is None:
        raise ValueError("the score has no noise levels of its own: pass a schedule.")
    if len(own) == 1:
        raise ValueError(f"the network has one noise level, {own.sigma_max:g}, but the flow needs a range of levels.")
    return NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS)


# -- The flow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flow:
    """The quantities that are integrated: the score, and the trace of the denoised image's Jacobian."""

    net: Score
    condition: Any
    probes: int | None
    generators: torch.Generator | Sequence[torch.Generator] | None

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score of x (N, ...) at the noise level sigma ()."""
        return score_at(self.net, x, sigma, self.condition)

    def score_and_trace(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The score, and the trace (N,) of the denoised image's Jacobian."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = self.score(x, sigma)
            check_differentiable(score)
            denoised = x + sigma.square() * score
            count = x[0].numel() if self.probes is None else self.probes
            trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for i, v in enumerate(self._directions(x)):
                (along,) = torch.autograd.grad(denoised, x, v, retain_graph=i < count - 1)
                trace += (along * v).flatten(1).sum(1)
        return score.detach(), trace if self.probes is None else trace / self.probes

    def _directions(self, x: Tensor) -> Iterator[Tensor]:
        """The unit vectors of all axes, or ``probes`` random vectors of signs; each of x's shape."""
        if self.probes is None:
            axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
            yield from (axis.view(x[0].shape).expand_as(x) for axis in axes)
        else:
            for _ in range(self.probes):
                z = standard_normal(x.shape, self.generators, x.device, x.dtype)
                yield torch.where(z < 0, -torch.ones_like(z), 1)


def _follow(flow: _Flow, x: Tensor, schedule: NoiseSchedule, progress: bool) -> tuple[Tensor, Tensor]:
    """The end of the path at the highest level, and the integral (N,) of the trace over log sigma."""
    sigmas = schedule.sigmas.flip(0).to(x.dtype).to(x.device)  # cast first: not every device has float64
    steps = list(itertools.pairwise(reversed(list(schedule))))
    integral = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    score, trace = flow.score_and_trace(x, sigmas[0])
    for i, (low, high) in enumerate(tqdm(steps, disable=not progress, desc="log-likelihood", unit="level"), start=1):
        euler = torch.add(x, score, alpha=-(high - low) * low)
        slope = low * score + high * flow.score(euler, sigmas[i])
        x = torch.add(x, slope, alpha=-(high - low) / 2)
        before = trace
        score, trace = flow.score_and_trace(x, sigmas[i])
        integral += (before + trace) * (math.log(high / low) / 2)
    return x, integral
