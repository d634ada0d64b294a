r"""Losses to train a score network: denoising and sliced score matching.

Denoising score matching adds Gaussian noise to the data and trains the network to predict :math:`-z / \sigma`, the
score of the noisy data given the clean data. With :math:`\tilde x = x + \sigma z` and z standard normal, the loss is

.. math:: \tfrac{1}{p} \sum_i \Bigl| s(\tilde x, \sigma)_i + \frac{z_i}{\sigma} \Bigr|^p \, \sigma^p .

For p = 2 it is minimal at the score of the data convolved with noise of level sigma. A score of zero has a mean loss of
D/2, where D is the number of values in an image: 392 for MNIST, 1536 for CIFAR-10. The minimum is not zero, since the
noise cannot be separated from the image exactly, least of all at low levels.

Sliced score matching (Song et al. 2019) estimates the trace of the score's Jacobian along random directions. It does
not need noisy data, but it needs second derivatives of the network.

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
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scorematch.core.arguments import check_choice
from scorematch.core.batches import as_mask, as_sigma, check_data, is_outside, per_image
from scorematch.core.conditions import class_of_each, map_parts
from scorematch.core.randomness import single_generator, standard_normal
from scorematch.core.scores import Given, Score, attribute, check_differentiable, noise_ratios, score_at
from scorematch.noise import NoiseSchedule, check_schedule, schedule_of

__all__ = ["dsm_loss", "loss_and_norm", "sliced_score_matching_loss"]

Reduction = Literal["mean", "none"]
_REDUCTIONS = get_args(Reduction)  # here, since the compiler of torch 2.5 has no get_args


def dsm_loss(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    sigma: float | Tensor | None = None,
    noise: Tensor | None = None,
    condition: Given = None,
    mask: Tensor | None = None,
    p: float = 2,
    weighting: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""The denoising score matching loss, for any network and data of any shape.

    .. math:: \tfrac{1}{p} \sum_i |r_i|^p \, w(\sigma), \qquad r = s(x + \sigma z, \sigma) + z / \sigma

    If the network has a ``value_range``, its first batch is compared with that range, with a warning for data in other
    units. Later batches are not checked, since reading their values would synchronize with the device.

    Args:
        net: a score: a ScoreNet, or any callable ``net(x, sigma)`` that returns a tensor of x's shape. It is called
            with ``sigma`` of shape (N,).
        x: clean data (N, ...), floating point; images in [0, 1].
        schedule: the noise levels, one of which is drawn uniformly for each sample; None is the network's own
            schedule.

        Rarely needed:

        sigma: the noise levels to use instead of random ones: a float, () or (N,), positive, in the units of x.
        noise: the standard normal noise z to use instead of random noise, of x's shape.
        condition: passed to the network as its third argument: a tensor (N, ...), or an int, the class of all samples.
            None calls the network with two arguments.
        mask: bool, broadcastable to x, True where the loss counts. For each image the sum over the mask is
            multiplied by D / (number of values in the mask).
        p: the power, at least 1 and finite.
        weighting: a function of sigma (N,) that returns w, (N,) or a weight for each channel, (N, C); None is sigma^p.
        reduction: "mean" over the batch, or "none" for one value per image.
        generator: the source of the noise levels and the noise: a ``torch.Generator``, or a seed, which gives the same
            numbers at each call; None is torch's global generator.

    Returns:
        The loss: a scalar, or (N,) for ``reduction="none"``; float32, or float64 for float64 data.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> x, z = torch.rand(8, 3, 4, 4), torch.ones(8, 3, 4, 4)
        >>> dsm_loss(lambda x, sigma: torch.zeros_like(x), x, sigma=0.5, noise=z)  # D / 2
        tensor(24.)
    """
    x, sigma, noise, _ = _perturbation(net, x, schedule, sigma, noise, generator)
    if not p >= 1:  # also true for NaN
        raise ValueError(f"p must be at least 1, got {p!r}.")
    if p == math.inf:
        raise ValueError("p must be finite, got inf. Write p=2 for the usual loss.")
    check_choice("reduction", reduction, _REDUCTIONS)
    # |sigma r|^p with sigma r = sigma s + z, which is of order one, whereas r grows as 1 / sigma.
    residual = (_scaled_score(net, x, sigma, noise, condition) + noise).abs().pow(p)
    if mask is not None:
        residual = residual * _weights_in(mask, x)
    if weighting is not None:
        weights = _weights_at(sigma, weighting, x)
        if weights.ndim == 2:  # for each channel
            residual, weights = residual * per_image(weights / sigma[:, None] ** p, x), sigma**p
    loss = residual.flatten(1).sum(1) / p
    if weighting is not None:
        loss = loss * (weights / sigma**p)
    return loss.mean() if reduction == "mean" else loss


def loss_and_norm(
    net: Score,
    x: Tensor,
    *,
    sigma: float | Tensor,
    noise: Tensor | None = None,
    condition: Given = None,
    mask: Tensor | None = None,
    generator: torch.Generator | int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The denoising loss of each image, and the squared norm of its score, in units that do not depend on sigma or D.

    .. math:: L = \tfrac{1}{D} \lVert \sigma s + z \rVert^2, \qquad N = \tfrac{1}{D} \lVert \sigma s \rVert^2, \qquad
              s = s(x + \sigma z, \sigma)

    A score of zero has a mean L of 1. :math:`\sigma^2 L` is the mean square error of the denoised image.
    For the exact score, :math:`\sigma s = -\mathrm{E}[z | x + \sigma z]`, and therefore
    :math:`\mathrm{E} N = 1 - \mathrm{E} L` at every noise level. Where the two differ, the norm of the network's score
    is wrong.

    Args:
        net: a score, as for ``dsm_loss``.
        x: clean data (N, ...), floating point; images in [0, 1].
        sigma: the noise level: a float, () or (N,), positive, in the units of x.
        noise: the standard normal noise z to use instead of random noise, of x's shape.
        condition: passed to the network as its third argument, as for ``dsm_loss``.
        mask: bool, broadcastable to x, True where the values count; D is then their number.
        generator: the source of the noise, as for ``dsm_loss``.

    Returns:
        L (N,), which is ``dsm_loss`` divided by D/2, and N (N,).

    Example:
        >>> x, z = torch.rand(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        >>> loss_and_norm(lambda x, sigma: torch.zeros_like(x), x, sigma=0.5, noise=z)
        (tensor([1.]), tensor([0.]))
    """
    scaled, wrong = scaled_score(net, x, sigma=sigma, noise=noise, condition=condition, generator=generator)
    weights = 1.0 if mask is None else _weights_in(mask, x)
    loss, norm = ((value.square() * weights).flatten(1).mean(1) for value in (wrong, scaled))
    return loss, norm


def scaled_score(
    net: Score,
    x: Tensor,
    *,
    sigma: float | Tensor,
    noise: Tensor | None = None,
    condition: Given = None,
    generator: torch.Generator | int | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The score of noisy data in units of :math:`1 / \sigma`, and its error as a prediction of the noise.

    The error times sigma is the difference between the denoised image and x.

    Args:
        net: a score, as for ``dsm_loss``.
        x: clean data, as for ``loss_and_norm``.
        sigma: the noise level, as for ``loss_and_norm``.
        noise: the noise z, as for ``loss_and_norm``.
        condition: passed to the network as its third argument, as for ``dsm_loss``.
        generator: the source of the noise, as for ``dsm_loss``.

    Returns:
        :math:`\sigma s` and :math:`\sigma s + z`, of x's shape.
    """
    x, sigma, noise, _ = _perturbation(net, x, None, sigma, noise, generator)
    scaled = _scaled_score(net, x, sigma, noise, condition)
    return scaled, scaled + noise


def sliced_score_matching_loss(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    sigma: float | Tensor | None = None,
    noise: Tensor | None = None,
    projections: Tensor | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    condition: Given = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""The sliced score matching loss with reduced variance (SSM-VR), at the noise levels of a schedule.

    .. math:: \Bigl( v^\top \nabla_{\tilde x} \bigl( v^\top s(\tilde x, \sigma) \bigr)
              + \tfrac{1}{2} \lVert s(\tilde x, \sigma) \rVert^2 \Bigr) w(\sigma), \qquad \tilde x = x + \sigma z

    Args:
        net: a score, as for ``dsm_loss``, that is twice differentiable.
        x: clean data (N, ...), floating point.
        schedule: the noise levels, as for ``dsm_loss``.
        sigma: the noise levels to use instead of random ones: a float, () or (N,), positive.
        noise: the standard normal noise z to use instead of random noise, of x's shape.
        projections: the directions v to use instead of standard normal ones, of x's shape.
        weighting: a function of sigma (N,) that returns w (N,); None is sigma^2.
        condition: the condition of the network, as for ``dsm_loss``.
        reduction: "mean" over the batch, or "none" for one value per image.
        generator: the source of the noise levels, the noise and the directions, as for ``dsm_loss``.

    Returns:
        The loss: a scalar, or (N,) for ``reduction="none"``.
    """
    x, sigma, noise, source = _perturbation(net, x, schedule, sigma, noise, generator)
    check_choice("reduction", reduction, _REDUCTIONS)
    if projections is None:
        v = standard_normal(x.shape, source, x.device, x.dtype)
    else:
        v = _like("projections", projections, x)
    # The faster kernels of attention have no second derivative.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        given = class_of_each(condition, x)
        sigma, v, given = _recordable(sigma), _recordable(v), map_parts(_recordable, given)
        ratios = noise_ratios(net, x)
        noisy = (x + per_image(sigma, x) * ratios * noise).detach().requires_grad_()
        score = ratios * score_at(net, noisy, sigma, given)  # that of x / ratios
        check_differentiable(score)
        (gradient,) = torch.autograd.grad((v * score).sum(), noisy, create_graph=True)
    loss = (v * ratios * gradient).flatten(1).sum(1) + score.square().flatten(1).sum(1) / 2
    loss = loss * (sigma**2 if weighting is None else _weights_at(sigma, weighting))
    return loss.mean() if reduction == "mean" else loss


def _recordable(value: Tensor) -> Tensor:
    """A copy of a tensor that was created in inference mode, which autograd can record; any other unchanged."""
    return value.clone() if value.is_inference() else value


def _weights_at(sigma: Tensor, weighting: Callable[[Tensor], Tensor], x: Tensor | None = None) -> Tensor:
    weights = torch.as_tensor(weighting(sigma), dtype=sigma.dtype, device=sigma.device)
    if weights.shape not in (torch.Size(), sigma.shape) and (x is None or weights.shape != x.shape[:2]):
        raise ValueError(
            f"weighting must return a number for each noise level, ({len(sigma)},), got shape {tuple(weights.shape)}."
        )
    return weights


def _scaled_score(net: Score, x: Tensor, sigma: Tensor, noise: Tensor, condition: Given) -> Tensor:
    """Sigma times the score of x with noise; sigma (N,)."""
    levels = per_image(sigma, x) * noise_ratios(net, x)
    return levels * score_at(net, x + levels * noise, sigma, class_of_each(condition, x))


# -- The noise --------------------------------------------------------------------------------------------------------


def _perturbation(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None,
    sigma: float | Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | int | None,
) -> tuple[Tensor, Tensor, Tensor, torch.Generator | None]:
    """Checks x, sigma and z and draws those that are not given; returns them and the generator.

    x and z (N, ...) and sigma (N,) are float32, or float64 for float64 data.
    """
    check_data(x)
    _warn_of_other_units(net, x)
    source = single_generator(generator)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if sigma is None:
        schedule = schedule_of(net) if schedule is None else schedule
        if schedule is None:
            raise ValueError("the score has no noise levels of its own: pass a schedule, or sigma.")
        check_schedule(schedule)
        sigma = schedule.sample(len(x), generator=source, device=x.device).to(x.dtype)
    else:
        sigma = as_sigma(sigma, x).expand(len(x))
    noise = standard_normal(x.shape, source, x.device, x.dtype) if noise is None else _like("noise", noise, x)
    return x, sigma, noise, source


def _like(name: str, given: Tensor, x: Tensor) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}. Write torch.as_tensor({name}).")
    if given.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(given.shape)}.")
    return given.to(dtype=x.dtype).to(x.device)  # cast first: not every device has float64


def _weights_in(mask: Tensor, x: Tensor) -> Tensor:
    """The weight of each value of x: 0 outside the mask, D / (number of values in the mask) inside."""
    mask = as_mask(mask, x)
    size = mask.flatten(1).sum(1).clamp(min=1)  # at least 1, so that an empty mask gives zero and not NaN
    return mask * per_image(x[0].numel() / size.to(torch.promote_types(x.dtype, torch.float32)), x)


# -- The units --------------------------------------------------------------------------------------------------------

_FAR = 100  # the largest ratio of the root mean square of x and the standard deviation that the network expects
_lock = threading.Lock()
_looked_at: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _warn_of_other_units(net: Score, x: Tensor) -> None:
    """Warns if the first batch of a network has NaN or values of another scale than the network expects."""
    if torch.compiler.is_compiling() or not isinstance(net, nn.Module):
        return
    value_range = attribute(net, "value_range")
    std = getattr(attribute(net, "preconditioning"), "assumed_std", None)
    if attribute(net, "units") is not None or (value_range is None and std is None):
        return
    owner = net if hasattr(net, "value_range") else net.get_submodule("module")  # of DistributedDataParallel and others
    with _lock:
        if owner in _looked_at:
            return
        try:
            low, high = (float(value) for value in x.detach().aminmax())
            size = float(x.detach().float().square().mean().sqrt()) if value_range is None else 0.0
        except RuntimeError:  # values cannot be read inside torch.func.vmap, and on the meta device
            return
        _looked_at.add(owner)
    if value_range is not None and is_outside(low, high, value_range):
        found = "NaN" if math.isnan(low) else f"values from {low:.3g} to {high:.3g}"
        warnings.warn(
            f"x must be in the network's value_range, {tuple(value_range)}, got {found}. Write (x + 1) / 2 for images "
            "in [-1, 1], x / 255 for 8-bit values, or net.value_range = (low, high) for data of another range.",
            stacklevel=4,
        )
    if size != 0 and std is not None and not std / _FAR <= size <= std * _FAR:
        warnings.warn(
            f"the network expects data with a mean near 0 and a standard deviation near {std:g}, got values from "
            f"{low:.3g} to {high:.3g}. Call net.fit_units(data) before the training.",
            stacklevel=4,
        )
