r"""A fast group normalization for tensors in the channels_last memory format on a CPU.

Convolutions are fastest in channels_last. In that format torch's group norm on a CPU is slow in some cases: its
backward pass takes two to seven times as long as the formula below, computed in a few passes over the data, and its
forward pass is slower if a group has few channels or the data are in half precision. ``group_norm_channels_last``
chooses between torch's forward kernel and its own implementation, which processes the batch in parts that fit into the
CPU caches.

torch's kernel computes the variance as a difference of two means. If the mean of a group is 10 times its standard
deviation, the error of the result is up to 1e-3; at 100 times it is a few percent. The implementation here subtracts
the mean first.

Let :math:`\hat x = (x - \mu) r`, where mu and r are the mean and the inverse standard deviation of the group, g the
gradient of the output, and [.] the mean over a group. The gradient of the input is

.. math:: r\,(\gamma g - [\gamma g] - \hat x\,[\gamma g \hat x]).

References:
    Wu & He, 2018, Group Normalization, arXiv:1803.08494.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Torch's forward kernel is used for at least this many pixels; in float32 also for at least this many channels per
# group, and for at most this many values, where the overhead of several calls is larger than their memory traffic.
_NATIVE_PIXELS = 1024
_NATIVE_CHANNELS = 8
_NATIVE_VALUES = 2**15
# The number of values in a part of the batch, for each thread: a megabyte of float32.
_PART_VALUES = 2**18


def group_norm_channels_last(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Group normalization of x (N, C, H, W) in channels_last on a CPU; the result has x's dtype and memory format."""
    if not torch.is_grad_enabled() and _is_native(x, groups):
        return _native(x, weight, bias, groups, eps)[0]
    return _GroupNorm.apply(x, weight, bias, groups, eps)[0]  # type: ignore[no-untyped-call]


def _is_native(x: Tensor, groups: int) -> bool:
    if x.shape[2] * x.shape[3] >= _NATIVE_PIXELS:
        return True
    return x.dtype == torch.float32 and (x.shape[1] // groups >= _NATIVE_CHANNELS or x.numel() <= _NATIVE_VALUES)


def _native(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's forward kernel: the result, and the mean and the inverse standard deviation of each group."""
    n, channels, height, width = x.shape
    sizes = (n, channels, height * width, groups, eps)
    if x.numel() > _NATIVE_VALUES:
        return torch.native_group_norm(x, weight, bias, *sizes)
    # In channels_last the kernel computes the variance as the mean of the squares minus the square of the mean, which
    # is inaccurate if the mean is many standard deviations. In the contiguous format it is accurate, and for small
    # tensors the two copies are cheap.
    y, mean, rstd = torch.native_group_norm(x.contiguous(), weight, bias, *sizes)
    return y.contiguous(memory_format=torch.channels_last), mean, rstd


def _by_parts(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Calls a function of tensors (N, ...) on parts of the batch that fit into the caches; concatenates the results."""
    part = max(1, _PART_VALUES * torch.get_num_threads() // tensors[0][0].numel())
    if part >= len(tensors[0]):
        return function(*tensors)
    results = [function(*parts) for parts in zip(*(tensor.split(part) for tensor in tensors), strict=True)]
    return tuple(torch.cat(whole) for whole in zip(*results, strict=True))


def _over_groups(means: Tensor, groups: int) -> Tensor:
    """Replaces the means of channels, (N, C), by the means of their groups, (N, C)."""
    n, channels = means.shape
    of_groups = means.reshape(n, groups, channels // groups).mean(-1, keepdim=True)
    return of_groups.expand(-1, -1, channels // groups).reshape(n, channels)


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and the inverse standard deviation of each channel's group, (N, C) float32, and x minus that mean."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = _over_groups(x.mean((2, 3)), groups)
    centered = x - mean[..., None, None]
    return mean, torch.rsqrt(_over_groups((centered * centered).mean((2, 3)), groups) + eps), centered


class _GroupNorm(torch.autograd.Function):
    """Group norm with forward and backward in a few passes over the tensor, and with forward-mode derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        stats = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = weight.to(stats), bias.to(stats)
        if _is_native(x, groups):
            y, mean, rstd = _native(x, gamma, beta, groups, eps)
            repeats = x.shape[1] // groups
            return y, mean.to(stats).repeat_interleave(repeats, 1), rstd.to(stats).repeat_interleave(repeats, 1)

        def normalize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, rstd, centered = _moments(x, groups, eps)
            y = torch.addcmul(beta[:, None, None], centered, (gamma * rstd)[..., None, None])
            return y.to(x.dtype), mean, rstd

        y, mean, rstd = _by_parts(normalize, x)
        return y, mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, _, ctx.groups, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.save_for_forward(x, weight, mean, rstd)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        gamma = weight.to(rstd.dtype)

        def gradients(x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if torch.is_grad_enabled():  # for second derivatives the statistics must depend on x
                mean, rstd, _ = _moments(x, ctx.groups, ctx.eps)
            g, wide = g.to(rstd.dtype), x.to(rstd.dtype)
            of_bias = g.mean((2, 3))
            of_weight = ((g * wide).mean((2, 3)) - mean * of_bias) * rstd  # the mean of (g times normalized x)
            slope = -rstd.square() * _over_groups(gamma * of_weight, ctx.groups)
            shift = -rstd * _over_groups(gamma * of_bias, ctx.groups) - slope * mean
            of_x = torch.addcmul(shift[..., None, None], wide, slope[..., None, None])
            of_x = torch.addcmul(of_x, g, (gamma * rstd)[..., None, None])
            return of_x.to(x.dtype), of_weight, of_bias

        of_x, of_weight, of_bias = _by_parts(gradients, x, g, mean, rstd)
        pixels = x.shape[2] * x.shape[3]
        return (
            of_x,
            (pixels * of_weight.sum(0)).to(weight.dtype),
            (pixels * of_bias.sum(0)).to(weight.dtype),
            None,
            None,
        )

    @staticmethod
    def jvp(
        ctx: Any, of_x: Tensor, of_weight: Tensor | None, of_bias: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # as in backward
            mean, rstd = _moments(x, ctx.groups, ctx.eps)[:2]
        normalized = (x.to(rstd.dtype) - mean[..., None, None]) * rstd[..., None, None]
        change = of_x.to(rstd.dtype)
        along = _over_groups((change * normalized).mean((2, 3)), ctx.groups)[..., None, None]
        change = change - _over_groups(change.mean((2, 3)), ctx.groups)[..., None, None] - normalized * along
        y = (weight * rstd)[..., None, None] * change
        if of_weight is not None:
            y = y + of_weight[:, None, None] * normalized
        if of_bias is not None:
            y = y + of_bias[:, None, None]
        return y.to(x.dtype), None, None
