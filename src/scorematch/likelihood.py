r"""How probable a score finds data: exact log-likelihood along the probability flow.

The flow :math:`dx/d\sigma = -\sigma s(x, \sigma)` carries the density of the data with noise of the quietest level
up to the loudest, where it is nearly normal. What it does to volumes on the way is known, and so

.. math:: \log p(x) = \log \mathcal{N}(x_{max};\, m, \sigma_{max}^2 I)
          + D \log\frac{\sigma_{max}}{\sigma_{min}}
          - \int_{\sigma_{min}}^{\sigma_{max}} \mathrm{tr}\, \frac{\partial D(x, \sigma)}{\partial x}\, d\log\sigma ,

D(x, sigma) being the denoised image :math:`x + \sigma^2 s`, and m the middle of the network's range. The path is
followed by Heun's method in sigma, the trace summed by the trapezoidal rule in log sigma; both are of second order in
the step. The trace takes D derivatives ("exactly", for points), or one for every random direction v of signs, as
:math:`\mathrm{E}\, v^\top (\partial D/\partial x)\, v` (Hutchinson), drawn anew at every level.

**What the number is of.** The model is what the flow makes of the normal distribution at sigma_max: a density, that
any two scores can be compared by. It is that of the *noisy* data of level sigma_min; and it is the score's own but for
the start: the data with noise of sigma_max are not quite normal. The mean over the data is too low for it, by at most
:math:`\mathrm{E}\lVert x_0 - m \rVert^2 / 2\sigma_{max}^2` nats: for MNIST and sigma_max 16.9 a third of a nat an
image, 0.0006 bits per dimension.

**Bits per dimension.** An 8-bit image is a point of the grid of 1/255. Spread uniformly over its cell of the grid, it
has the density p, and

.. math:: -\log_2 P(\mathrm{image}) \le -\mathrm{E}_u \log_2 p\bigl(x + (u - \tfrac12)/255\bigr) + D \log_2 255,
          \qquad u \sim \mathcal{U}[0, 1]^D,

divided by D: what a lossless code of the images would take. The density is blurred by sigma_min, and so a value that an
exact score is certain of takes :math:`\log_2(255 \sigma_{min} \sqrt{2\pi})` bits, 2.7 at 0.01 and 0.4 at 0.002. Where
sigma_min is well above 1/255 a learned score has seen no image as clean as a dequantized one: the number is a density's
still, but hangs on what the network does where it was not trained, and needs many levels. To compare networks, take
:math:`-\log p` of images with noise of sigma_min, which the density is of: its mean is least for the true one and never
below the entropy of the noise.

References:
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456, Eq. 39-40.
    Grathwohl et al., 2019, FFJORD, arXiv:1810.01367 (Hutchinson's estimate along a flow).
    Theis et al., 2016, A Note on the Evaluation of Generative Models, arXiv:1511.01844 (dequantization).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from scorematch.noise import NoiseSchedule, own_middle, own_schedule, standard_normal
from scorematch.sampling.sampler import Generator, evaluating

_LEVELS = 50


def log_likelihood(
    net: Callable[..., Tensor],
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    probes: int | None = 1,
    condition: Tensor | None = None,
    generator: Generator = None,
    progress: bool = True,
) -> Tensor:
    """The logarithm of the density that a score's probability flow gives to data, in nats.

    It takes two network calls a level, one of them with ``probes`` derivatives. Images keep apart: a large set can be
    taken in parts.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x, differentiable in x: a ScoreNet or any callable.
        x: the data (N, ...), floating point, images in [0, 1].
        schedule: the levels of the integration, from the loudest, where the density is taken for normal, to the
            quietest, whose noise the density has; None is ``NoiseSchedule.karras`` with 50 levels between the ends of
            the network's own.

        Rarely needed:

        probes: random directions for the trace at every level; None takes all D axes, which is exact.
        condition: handed to the network as its third argument, (N, ...).
        generator: for the directions, as for a sampler: None takes torch's global one, a list holds one for each image.
        progress: whether to show a bar.

    Returns:
        log p (N,), per unit of x's volume, in x's dtype, float32 at least, without a gradient.

    Raises:
        TypeError: for integer data.
        ValueError: for a plain callable without schedule, data that are no batch, or no probe at all.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> def score(x, sigma):  # of the standard normal distribution in two dimensions, perturbed
        ...     return -x / (1 + sigma**2)
        >>> schedule = NoiseSchedule.karras(100, 0.01, 100)
        >>> log_likelihood(score, torch.zeros(1, 2), schedule, probes=None, progress=False)  # -log(2 pi) = -1.8379
        tensor([-1.837...])

    References:
        Song et al., 2021, arXiv:2011.13456, Eq. 39.
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, images in [0, 1], got {x.dtype}. Write x / 255 for 8-bit images.")
    if x.ndim < 2 or not len(x):
        raise ValueError(f"x must be a batch (N, ...), got shape {tuple(x.shape)}.")
    if probes is not None and (not isinstance(probes, int) or probes < 1):
        raise ValueError(f"probes must be an integer of at least 1, or None for the exact trace, got {probes!r}.")
    if schedule is None:
        own = own_schedule(net)
        if own is None:
            raise ValueError("a plain callable has no noise levels of its own: pass a schedule.")
        schedule = NoiseSchedule.karras(own.sigma_max, own.sigma_min, _LEVELS)
    if torch.is_inference_mode_enabled():  # in which nothing can be differentiated
        with torch.inference_mode(False):
            condition = None if condition is None else condition.clone()
            return log_likelihood(
                net, x.clone(), schedule, probes=probes, condition=condition, generator=generator, progress=progress
            )
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    dimension, steps = x[0].numel(), list(itertools.pairwise(reversed(list(schedule))))
    ladder = schedule.sigmas.flip(0).to(x.dtype).to(x.device)

    def score(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x, sigma) if condition is None else net(x, sigma, condition)

    def directions() -> list[Tensor]:
        if probes is None:
            return [
                axis.expand_as(x) for axis in torch.eye(dimension, dtype=x.dtype, device=x.device).view(-1, *x[0].shape)
            ]
        drawn = (standard_normal(x.shape, generator, x.device, x.dtype) for _ in range(probes))
        return [torch.where(z < 0, -1.0, 1.0).to(x.dtype) for z in drawn]

    def score_and_trace(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The score, and the trace of the denoised image's Jacobian."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            gradient = score(x, sigma)
            denoised = x + sigma.square() * gradient
            trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
            vs = directions()
            for v in vs:
                (along,) = torch.autograd.grad(denoised, x, v, retain_graph=v is not vs[-1])
                trace += (along * v).flatten(1).sum(1)
        return gradient.detach(), trace if probes is None else trace / probes

    integral = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    with torch.no_grad(), evaluating(net), tqdm(total=len(steps), disable=not progress, desc="log-likelihood") as bar:
        gradient, trace = score_and_trace(x, ladder[0])
        for level, (sigma, louder) in enumerate(steps, start=1):
            end = torch.add(x, gradient, alpha=-(louder - sigma) * sigma)
            slope = sigma * gradient + louder * score(end, ladder[level])
            x = torch.add(x, slope, alpha=-(louder - sigma) / 2)
            before = trace
            gradient, trace = score_and_trace(x, ladder[level])
            integral += (before + trace) * (math.log(louder / sigma) / 2)
            bar.update()
    loudest, quietest = schedule.sigma_max, schedule.sigma_min
    squares = ((x - own_middle(net)) / loudest).square().flatten(1).sum(1)
    normal = -squares / 2 - dimension * math.log(loudest * math.sqrt(2 * math.pi))
    return normal + dimension * math.log(loudest / quietest) - integral


def bits_per_dimension(
    net: Callable[..., Tensor],
    images: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    probes: int | None = 1,
    condition: Tensor | None = None,
    generator: Generator = None,
    progress: bool = True,
) -> Tensor:
    r"""The bits that a lossless code by a score's density takes for each value of 8-bit images.

    .. math:: -\frac{1}{D} \log_2 p\bigl(x + (u - \tfrac12) / 255\bigr) + \log_2 255

    with u uniform in [0, 1], drawn once for an image: its mean over images, or over draws, is an upper bound of the
    images' own bits. See the module on the floor that the quietest level sets.

    Args:
        net: a score of images in [0, 1].
        images: (N, ...), floating point, multiples of 1/255 in [0, 1].
        schedule: the levels, as for ``log_likelihood``; likewise the other arguments.

        Rarely needed:

        probes: random directions for the trace; None is exact.
        condition: handed to the network.
        generator: for u, then for the directions.
        progress: whether to show a bar.

    Returns:
        Bits per dimension (N,).

    Raises:
        TypeError: for integer images.
        ValueError: for images beyond [0, 1], or as ``log_likelihood``.

    References:
        Theis et al., 2016, arXiv:1511.01844, Sec. 3.1.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}. Write images / 255.")
    low, high = (float(images.min()), float(images.max())) if images.numel() else (0.0, 1.0)
    if low < 0 or high > 1:
        raise ValueError(f"images must lie in [0, 1], got values from {low:.3g} to {high:.3g}.")
    images = images.detach().to(torch.promote_types(images.dtype, torch.float32))
    z = standard_normal(images.shape, generator, images.device, images.dtype)
    x = images + (torch.special.ndtr(z) - 0.5) / 255  # ndtr, the normal distribution function, makes z uniform
    nats = log_likelihood(net, x, schedule, probes=probes, condition=condition, generator=generator, progress=progress)
    return -nats / (x[0].numel() * math.log(2)) + math.log2(255)
