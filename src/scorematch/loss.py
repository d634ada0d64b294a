r"""Objectives that train a score network: denoising and sliced score matching.

Denoising score matching regresses the score of the perturbed data on the score of the perturbation. With
:math:`\tilde x = x + \sigma z` and z standard normal,

.. math:: \tfrac{1}{p} \sum_i \Bigl| s(\tilde x, \sigma)_i + \frac{z_i}{\sigma} \Bigr|^p \, \sigma^p ,

least (for p = 2) where s is the score of the data convolved with noise of level sigma. A network that answers zero
scores D/2, D being the number of values in an image: 392 for MNIST, 1536 for CIFAR-10. The floor is not zero, because
the noise of a quiet level cannot be told from the image.

Sliced score matching (Song et al. 2019) needs no perturbation: it takes the trace of the score's Jacobian along random
directions, at the price of a second derivative.

References:
    Vincent, 2011, A Connection Between Score Matching and Denoising Autoencoders.
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, Eq. 5-6.
    Song et al., 2019, Sliced Score Matching, arXiv:1905.07088, Eq. 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule, expand, own_schedule, standard_normal

Score = Callable[..., Tensor]
Reduction = Literal["mean", "none"]


def dsm_loss(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None = None,
    *,
    sigma: float | Tensor | None = None,
    noise: Tensor | None = None,
    condition: Tensor | None = None,
    region: Tensor | None = None,
    p: float = 2,
    weighting: Callable[[Tensor], Tensor] | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The denoising score matching loss, for any network and data of any shape.

    .. math:: \tfrac{1}{p} \sum_i |r_i|^p \, w(\sigma), \qquad r = s(x + \sigma z, \sigma) + z / \sigma

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x, with ``sigma`` of shape (N,).
        x: clean data (N, ...), floating point; images in [0, 1].
        schedule: where the noise levels are drawn from, uniformly; None is the network's own ladder.

        Rarely needed:

        sigma: the noise levels, a float, () or (N,), in the units of x, instead of drawn ones.
        noise: the standard normal noise z, of x's shape, instead of drawn noise.
        condition: handed to the network as its third argument; not passed on when None.
        region: bool, broadcastable to x, True where the loss counts; the sum over it is scaled by D / its size, per
            image.
        p: the power, at least 1.
        weighting: a function of sigma (N,) giving w (N,); None is sigma^p.
        reduction: "mean" over the batch, or "none" for one value per image.
        generator: what is drawn here is drawn from it; None takes torch's global one.

    Returns:
        The loss: a scalar, or (N,) for ``reduction="none"``.

    Raises:
        TypeError: for integer data.
        ValueError: for a plain callable without schedule and sigma, a sigma that is not positive, shapes that do not
            fit.

    Example:
        >>> from scorematch import NoiseSchedule
        >>> x, z = torch.rand(8, 3, 4, 4), torch.ones(8, 3, 4, 4)
        >>> dsm_loss(lambda x, sigma: torch.zeros_like(x), x, sigma=0.5, noise=z)  # D / 2
        tensor(24.)
    """
    x, sigma, noise = _perturbation(net, x, schedule, sigma, noise, generator)
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p!r}.")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}.')
    levels = expand(sigma, x)
    noisy = x + levels * noise
    score = net(noisy, sigma) if condition is None else net(noisy, sigma, condition)
    if score.shape != x.shape:
        raise ValueError(f"the network answered shape {tuple(score.shape)} to data of shape {tuple(x.shape)}.")
    # sigma r = sigma s + z stays of order one where r itself grows as 1 / sigma: the power is taken of it.
    residual = (levels * score + noise).abs().pow(p)
    if region is not None:
        residual = residual * _share(region, x)
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
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The sliced score matching loss with reduced variance, at the noise levels of a ladder.

    .. math:: \Bigl( v^\top \nabla_{\tilde x} \bigl( v^\top s(\tilde x, \sigma) \bigr)
              + \tfrac{1}{2} \lVert s(\tilde x, \sigma) \rVert^2 \Bigr) w(\sigma), \qquad \tilde x = x + \sigma z

    Unlike ``dsm_loss`` it is least, and negative, at the true score without knowing the noise, so it can be computed
    with little or no perturbation (``noise`` of zeros). It differentiates the network twice.

    Args:
        net: a score, ``net(x, sigma)`` -> the shape of x, with ``sigma`` of shape (N,), differentiable in x.
        x: clean data (N, ...), floating point.
        schedule: where the noise levels are drawn from; None is the network's own ladder.
        sigma: the noise levels, a float, () or (N,), instead of drawn ones.
        noise: the standard normal noise z, of x's shape, instead of drawn noise.
        projections: the directions v, of x's shape, instead of standard normal ones.
        weighting: a function of sigma (N,) giving w (N,); None is sigma^2.
        reduction: "mean" over the batch, or "none" for one value per image.
        generator: what is drawn here is drawn from it; None takes torch's global one.

    Returns:
        The loss: a scalar, or (N,) for ``reduction="none"``.

    Raises:
        TypeError, ValueError: as ``dsm_loss``.
    """
    x, sigma, noise = _perturbation(net, x, schedule, sigma, noise, generator)
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}.')
    v = (
        standard_normal(x.shape, generator, x.device, x.dtype)
        if projections is None
        else _like("projections", projections, x)
    )
    with torch.enable_grad():
        noisy = (x + expand(sigma, x) * noise).detach().requires_grad_()
        score = net(noisy, sigma)
        (gradient,) = torch.autograd.grad((v * score).sum(), noisy, create_graph=True)
    loss = (v * gradient).flatten(1).sum(1) + score.square().flatten(1).sum(1) / 2
    loss = loss * (sigma**2 if weighting is None else weighting(sigma))
    return loss.mean() if reduction == "mean" else loss


def _perturbation(
    net: Score,
    x: Tensor,
    schedule: NoiseSchedule | None,
    sigma: float | Tensor | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, sigma (N,) and z, checked and drawn where they are not given; float32 at least."""
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, images in [0, 1], got {x.dtype}. Write x / 255 for 8-bit images.")
    if x.ndim < 2:
        raise ValueError(f"x must be a batch (N, ...), got shape {tuple(x.shape)}.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if sigma is None:
        schedule = own_schedule(net) if schedule is None else schedule
        if schedule is None:
            raise ValueError("a plain callable has no noise levels of its own: pass a schedule (or sigma).")
        sigma = schedule.sample(len(x), generator=generator, device=x.device).to(x.dtype)
    else:
        sigma = _levels(sigma, x)
    noise = standard_normal(x.shape, generator, x.device, x.dtype) if noise is None else _like("noise", noise, x)
    return x, sigma, noise


def _levels(sigma: float | Tensor, x: Tensor) -> Tensor:
    given = torch.as_tensor(sigma)
    if given.ndim > 1 or (given.ndim == 1 and len(given) != len(x)):
        raise ValueError(f"sigma must be a float, () or ({len(x)},) like the batch, got shape {tuple(given.shape)}.")
    if given.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere the look would wait for the device
        try:
            positive = bool((given > 0).all())
        except RuntimeError:  # inside torch.func.vmap a value cannot be looked at
            positive = True
        if not positive:
            raise ValueError(
                f"sigma must be positive, got {given[~(given > 0)][0].item() if given.ndim else given.item():g}."
            )
    return given.to(device=x.device, dtype=x.dtype).expand(len(x))


def _like(name: str, given: Tensor, x: Tensor) -> Tensor:
    if given.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(given.shape)}.")
    return given.to(device=x.device, dtype=x.dtype)


def _share(region: Tensor, x: Tensor) -> Tensor:
    """What each value counts: 0 outside the region, D / its size inside."""
    if region.dtype != torch.bool:
        raise TypeError(f"region must be bool, True where the loss counts, got {region.dtype}. Write region > 0.5.")
    try:
        region = region.to(x.device).expand(x.shape)
    except RuntimeError as error:
        raise ValueError(
            f"region must be broadcastable to x, {tuple(x.shape)}, got shape {tuple(region.shape)}."
        ) from error
    size = region.flatten(1).sum(1).clamp(min=1)  # an empty region counts nothing, and divides by nothing
    return region * expand(x[0].numel() / size.to(x.dtype), x)
