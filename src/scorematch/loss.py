r"""Losses that train a score network: denoising and sliced score matching.

Denoising score matching adds noise to the data and trains the network to predict the score of that noise. With
:math:`\tilde x = x + \sigma z` and z standard normal, the loss is

.. math:: \tfrac{1}{p} \sum_i \Bigl| s(\tilde x, \sigma)_i + \frac{z_i}{\sigma} \Bigr|^p \, \sigma^p .

For p = 2 its minimum is at the score of the data convolved with noise of level sigma. A network whose output is zero
has a loss of D/2, where D is the number of values in an image: 392 for MNIST, 1536 for CIFAR-10. The minimum is not
zero, since noise of a low level cannot be told from the image.

Sliced score matching (Song et al. 2019) estimates the trace of the score's Jacobian along random directions. It needs
no noise in the data, but a second derivative.

References:
    Vincent, 2011, A Connection Between Score Matching and Denoising Autoencoders.
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Eq. 5-6.
    Song et al., 2019, Sliced Score Matching, arXiv:1905.07088, Eq. 8.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from scorematch.noise import NoiseSchedule
from scorematch.protocol import Score, as_sigma, attribute, check_data, check_score, per_image, schedule_of
from scorematch.randomness import single_generator, standard_normal

Reduction = Literal["mean", "none"]


def dsm_loss(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    sigma: float | Tensor | None = None,
    noise: Tensor | None = None,
    condition: Tensor | int | None = None,
    region: Tensor | None = None,
    p: float = 2,
    weighting: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""The denoising score matching loss, for any network and data of any shape.

    .. math:: \tfrac{1}{p} \sum_i |r_i|^p \, w(\sigma), \qquad r = s(x + \sigma z, \sigma) + z / \sigma

    The first batch of a network that has a value range is compared with that range, and a warning says if the data are
    in other units. Later batches are not looked at, since a look waits for the device.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x, with ``sigma`` of shape (N,).
        x: clean data (N, ...), floating point; images in [0, 1].
        schedule: the noise levels, from which each sample gets one, drawn uniformly; None is the network's own
            schedule.

        Rarely needed:

        sigma: the noise levels, a float, () or (N,), in the units of x, instead of drawn ones.
        noise: the standard normal noise z, of x's shape, instead of drawn noise.
        condition: passed to the network as its third argument, (N, ...), or an int, the class of all samples; None
            calls the network with two arguments.
        region: bool, broadcastable to x, True where the loss counts. The sum over it is scaled by D / its size, image
            by image.
        p: the power, at least 1.
        weighting: a function of sigma (N,) that returns w (N,); None is sigma^p.
        reduction: "mean" over the batch, or "none" for one value per image.
        generator: the source of the noise levels and the noise: a ``torch.Generator``, or a seed, which gives the same
            numbers at each call; None is torch's global generator.

    Returns:
        The loss: a scalar, or (N,) for ``reduction="none"``.

    Raises:
        TypeError: for data that are not a floating-point tensor, or a region that is not bool.
        ValueError: for a plain callable without schedule and sigma, a sigma that is not positive, or shapes that do not
            fit.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> x, z = torch.rand(8, 3, 4, 4), torch.ones(8, 3, 4, 4)
        >>> dsm_loss(lambda x, sigma: torch.zeros_like(x), x, sigma=0.5, noise=z)  # D / 2
        tensor(24.)
    """
    x, sigma, noise, _ = _perturbation(net, x, schedule, sigma, noise, generator)
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p!r}.")
    _check_reduction(reduction)
    levels = per_image(sigma, x)
    noisy = x + levels * noise
    score = check_score(net(noisy, sigma) if condition is None else net(noisy, sigma, condition), x)
    # The power is taken of sigma r = sigma s + z, which is of order one, while r itself grows as 1 / sigma.
    residual = (levels * score + noise).abs().pow(p)
    if region is not None:
        residual = residual * _weights_in(region, x)
    loss = residual.flatten(1).sum(1) / p
    if weighting is not None:
        loss = loss * (weighting(sigma) / sigma**p)
    return loss.mean() if reduction == "mean" else loss


def sliced_score_matching_loss(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    sigma: float | Tensor | None = None,
    noise: Tensor | None = None,
    projections: Tensor | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""The sliced score matching loss with reduced variance, at the noise levels of a schedule.

    .. math:: \Bigl( v^\top \nabla_{\tilde x} \bigl( v^\top s(\tilde x, \sigma) \bigr)
              + \tfrac{1}{2} \lVert s(\tilde x, \sigma) \rVert^2 \Bigr) w(\sigma), \qquad \tilde x = x + \sigma z

    Args:
        net: a score, differentiable twice.
        x: clean data (N, ...), floating point.
        schedule: the noise levels, as for ``dsm_loss``.
        sigma: the noise levels, instead of drawn ones.
        noise: the noise z, instead of drawn noise.
        projections: the directions v, of x's shape, instead of standard normal ones.
        weighting: a function of sigma (N,) that returns w (N,); None is sigma^2.
        reduction: "mean" over the batch, or "none" for one value per image.
        generator: the source of what is drawn, as for ``dsm_loss``.

    Returns:
        The loss: a scalar, or (N,) for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as ``dsm_loss``.
    """
    x, sigma, noise, source = _perturbation(net, x, schedule, sigma, noise, generator)
    _check_reduction(reduction)
    if projections is None:
        v = standard_normal(x.shape, source, x.device, x.dtype)
    else:
        v = _like("projections", projections, x)
    with torch.enable_grad():
        noisy = (x + per_image(sigma, x) * noise).detach().requires_grad_()
        score = check_score(net(noisy, sigma), x)
        (gradient,) = torch.autograd.grad((v * score).sum(), noisy, create_graph=True)
    loss = (v * gradient).flatten(1).sum(1) + score.square().flatten(1).sum(1) / 2
    loss = loss * (sigma**2 if weighting is None else weighting(sigma))
    return loss.mean() if reduction == "mean" else loss


# -- The noise --------------------------------------------------------------------------------------------------------


def _perturbation(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None,
    sigma: float | Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | int | None,
) -> tuple[Tensor, Tensor, Tensor, torch.Generator | None]:
    """x, sigma (N,) and z in float32 at least, checked, and drawn where they are not given; and their generator."""
    check_data(x)
    _warn_of_other_units(net, x)
    source = single_generator(generator)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if sigma is None:
        schedule = schedule_of(net) if schedule is None else schedule
        if schedule is None:
            raise ValueError("a plain callable has no noise levels of its own: pass a schedule, or sigma.")
        sigma = schedule.sample(len(x), generator=source, device=x.device).to(x.dtype)
    else:
        sigma = as_sigma(sigma, x).expand(len(x))
    noise = standard_normal(x.shape, source, x.device, x.dtype) if noise is None else _like("noise", noise, x)
    return x, sigma, noise, source


def _like(name: str, given: Tensor, x: Tensor) -> Tensor:
    if given.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(given.shape)}.")
    return given.to(dtype=x.dtype).to(x.device)  # cast first: not every device has float64


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}.')


def _weights_in(region: Tensor, x: Tensor) -> Tensor:
    """The weight of each value: 0 outside the region, D / its size inside."""
    if region.dtype != torch.bool:
        raise TypeError(f"region must be bool, True where the loss counts, got {region.dtype}. Write region > 0.5.")
    try:
        region = region.to(x.device).expand(x.shape)
    except RuntimeError as error:
        raise ValueError(
            f"region must be broadcastable to x, {tuple(x.shape)}, got shape {tuple(region.shape)}."
        ) from error
    size = region.flatten(1).sum(1).clamp(min=1)  # at least 1, so that an empty region gives zero and not NaN
    return region * per_image(x[0].numel() / size.to(x.dtype), x)


# -- The units --------------------------------------------------------------------------------------------------------

# Data in other units leave the range by much more than this share of it; interpolation of images overshoots by less.
_OVERSHOOT = 0.1

_lock = threading.Lock()
_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_other_units(net: Score, x: Tensor) -> None:
    """Warns if the first batch of a network with a value range is outside that range, or has NaN."""
    if torch.compiler.is_compiling() or not isinstance(net, nn.Module):
        return
    value_range = attribute(net, "value_range")
    if value_range is None:
        return
    owner = net if hasattr(net, "value_range") else net.get_submodule("module")  # of DistributedDataParallel and others
    with _lock:
        if owner in _looked_at:
            return
        try:
            low, high = (float(value) for value in x.detach().aminmax())
        except RuntimeError:  # inside torch.func.vmap, and on the meta device, values cannot be read
            return
        _looked_at.add(owner)
    margin = _OVERSHOOT * (value_range[1] - value_range[0])
    if not (low >= value_range[0] - margin and high <= value_range[1] + margin):  # written so that NaN warns
        found = "NaN" if math.isnan(low) else f"values from {low:.3g} to {high:.3g}"
        warnings.warn(
            f"x has {found}, but the network's value_range is {tuple(value_range)}. For images in [-1, 1] write "
            "(x + 1) / 2, for 8-bit values x / 255; for data of another range pass value_range= to ScoreNet.",
            stacklevel=4,
        )
