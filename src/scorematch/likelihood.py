r"""Log-likelihood of data under a score, along the probability flow.

The flow :math:`dx/d\sigma = -\sigma s(x, \sigma)` carries the density of the data with noise of the lowest level to the
highest level, where it is nearly normal. The change of volume along the path is known, so that

.. math:: \log p(x) = \log \mathcal{N}(x_{max};\, m, \sigma_{max}^2 I)
          + D \log\frac{\sigma_{max}}{\sigma_{min}}
          - \int_{\sigma_{min}}^{\sigma_{max}} \mathrm{tr}\, \frac{\partial D(x, \sigma)}{\partial x}\, d\log\sigma ,

where D(x, sigma) is the denoised image :math:`x + \sigma^2 s` and m the middle of the network's value range. The path
is computed with Heun's method in sigma, the integral of the trace with the trapezoidal rule in log sigma; both are of
second order in the step. The trace is exact with D derivatives, which is affordable for points, or estimated with one
derivative for each random direction v of signs, as :math:`\mathrm{E}\, v^\top (\partial D/\partial x)\, v`
(Hutchinson). The directions are drawn anew at each level.

**What is measured.** The model's density at sigma_min: the density that the flow makes of the normal distribution at
sigma_max. Any two scores can be compared by it. It describes the data *with noise* of level sigma_min, and it differs
from the density that the score itself describes by the start alone, since data with noise of sigma_max are not quite
normal. The mean over the data is too low for that reason by at most
:math:`\mathrm{E}\lVert x_0 - m \rVert^2 / 2\sigma_{max}^2` nats: for MNIST and sigma_max 16.9 a third of a nat per
image, 0.0006 bits per dimension.

**Bits per dimension.** An 8-bit image is a point of a grid of spacing 1/255. With a number drawn uniformly from each
value's cell of the grid it has the density p, and

.. math:: -\log_2 P(\mathrm{image}) \le -\mathrm{E}_u \log_2 p\bigl(x + (u - \tfrac12)/255\bigr) + D \log_2 255,
          \qquad u \sim \mathcal{U}[0, 1]^D ,

which is divided by D: the bits per value that a lossless code of the images would need. Since the density is blurred by
sigma_min, a value that an exact score is certain of takes :math:`\log_2(255 \sigma_{min} \sqrt{2\pi})` bits, 2.7 at
0.01 and 0.4 at 0.002. Where sigma_min is well above 1/255, a learned score has not been trained on images as clean as
these: the result is still that of a density, but it depends on what the network does outside its training data, and it
needs many levels. To compare networks, use :math:`-\log p` of images with noise of sigma_min: its mean is least for the
true density and never below the entropy of the noise.

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

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.noise import NoiseSchedule
from scorematch.protocol import Score, check_data, check_score, evaluating, middle_of, schedule_of
from scorematch.randomness import Generator, as_generator, standard_normal, uniform

_LEVELS = 50


def log_likelihood(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    probes: int | None = 1,
    condition: Tensor | int | None = None,
    generator: Generator = None,
    progress: bool = True,
) -> Tensor:
    """The logarithm of the density of data under a score's probability flow, in nats.

    It takes two network calls per level, one of them with ``probes`` derivatives. The samples do not depend on each
    other: a large set can be passed in parts.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x, differentiable in x: a ScoreNet or any callable.
        x: the data (N, ...), floating point; images in [0, 1].
        schedule: the levels of the integration, from the highest, where the density is taken to be normal, to the
            lowest, at which the density of the data is measured; None is ``NoiseSchedule.karras`` with 50 levels over
            the range of the network's own schedule.

        Rarely needed:

        probes: random directions for the trace at each level; None takes all D axes, which is exact.
        condition: passed to the network as its third argument, (N, ...), or an int, the class of all samples.
        generator: the source of the directions, as for a sampler: a ``torch.Generator``, or a seed; None is torch's
            global generator; a list holds one for each sample.
        progress: whether to show a progress bar.

    Returns:
        log p (N,), per unit of x's volume, in x's dtype and float32 at least, without a gradient.

    Raises:
        TypeError: for data that are not a floating-point tensor.
        ValueError: for a plain callable without schedule, data that are not a batch, or fewer than one probe.

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
    if probes is not None and (not isinstance(probes, int) or probes < 1):
        raise ValueError(f"probes must be an integer of at least 1, or None for the exact trace, got {probes!r}.")
    schedule = _default_schedule(net) if schedule is None else schedule
    generators = as_generator(generator)
    dimension = x[0].numel()
    # Nothing can be differentiated in inference mode, nor a tensor that was made in it.
    with torch.inference_mode(False), torch.no_grad(), evaluating(net):
        x = _without_history(x).to(torch.promote_types(x.dtype, torch.float32))
        condition = _without_history(condition) if isinstance(condition, Tensor) else condition
        end, integral = _follow(_Flow(net, condition, probes, generators), x, schedule, progress)
        squares = ((end - middle_of(net)) / schedule.sigma_max).square().flatten(1).sum(1)
        normal = -squares / 2 - dimension * math.log(schedule.sigma_max * math.sqrt(2 * math.pi))
        return normal + dimension * math.log(schedule.sigma_max / schedule.sigma_min) - integral


def bits_per_dimension(
    net: Score,
    images: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    probes: int | None = 1,
    condition: Tensor | int | None = None,
    generator: Generator = None,
    progress: bool = True,
) -> Tensor:
    r"""The bits per value that a lossless code of 8-bit images by a score's density needs.

    .. math:: -\frac{1}{D} \log_2 p\bigl(x + (u - \tfrac12) / 255\bigr) + \log_2 255

    with u uniform in [0, 1], drawn once per image. The mean over images, or over draws, is an upper bound of the bits
    of the images themselves. The lowest noise level sets a floor; see the module.

    Args:
        net: a score of images in [0, 1].
        images: (N, ...), floating point, multiples of 1/255 in [0, 1].
        schedule: the levels, as for ``log_likelihood``; likewise the other arguments.

        Rarely needed:

        probes: random directions for the trace; None is exact.
        condition: passed to the network.
        generator: the source of u, then of the directions.
        progress: whether to show a progress bar.

    Returns:
        Bits per dimension (N,).

    Raises:
        TypeError: for images that are not a floating-point tensor.
        ValueError: for images outside [0, 1], or as ``log_likelihood``.

    References:
        Theis et al., 2016, arXiv:1511.01844, Sec. 3.1.
    """
    check_data(images, "images")
    low, high = (float(value) for value in images.detach().aminmax())
    if not (low >= 0 and high <= 1):  # written so that NaN is refused
        raise ValueError(f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}.")
    generators = as_generator(generator)
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    u = uniform(images.shape, generators, images.device, images.dtype)
    x = images + (u - 0.5) / 255
    nats = log_likelihood(net, x, schedule, probes=probes, condition=condition, generator=generators, progress=progress)
    return -nats / (x[0].numel() * math.log(2)) + math.log2(255)


# -- The flow ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flow:
    """What the integration needs of a score at a point of the path: the score, and the trace of D's Jacobian."""

    net: Score
    condition: Tensor | int | None
    probes: int | None
    generators: torch.Generator | Sequence[torch.Generator] | None

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The score of x at a noise level ()."""
        score = self.net(x, sigma) if self.condition is None else self.net(x, sigma, self.condition)
        return check_score(score, x)

    def score_and_trace(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The score, and the trace (N,) of the denoised image's Jacobian."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            score = self.score(x, sigma)
            denoised = x + sigma.square() * score
            count = x[0].numel() if self.probes is None else self.probes
            trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            for i, v in enumerate(self._directions(x)):
                (along,) = torch.autograd.grad(denoised, x, v, retain_graph=i < count - 1)
                trace += (along * v).flatten(1).sum(1)
        return score.detach(), trace if self.probes is None else trace / self.probes

    def _directions(self, x: Tensor) -> Iterator[Tensor]:
        """All axes, or as many random vectors of signs as there are probes; each of x's shape."""
        if self.probes is None:
            axes = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
            yield from (axis.view(x[0].shape).expand_as(x) for axis in axes)
        else:
            for _ in range(self.probes):
                z = standard_normal(x.shape, self.generators, x.device, x.dtype)
                yield torch.where(z < 0, -torch.ones_like(z), 1)


def _follow(flow: _Flow, x: Tensor, schedule: NoiseSchedule, progress: bool) -> tuple[Tensor, Tensor]:
    """The end of the flow's path at the highest level, and the integral (N,) of the trace over log sigma."""
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


def _default_schedule(net: Score) -> NoiseSchedule:
    own = schedule_of(net)
    if own is None:
        raise ValueError("a plain callable has no noise levels of its own: pass a schedule.")
    return NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS)


def _without_history(x: Tensor) -> Tensor:
    """The tensor without its gradient, and as an ordinary tensor if it was made in inference mode."""
    return x.clone() if x.is_inference() else x.detach()
