r"""The norms: instance normalization++, which the NCSN family has to itself, and a group norm that is fast on a CPU.

Instance normalization removes each channel's mean, and with it every difference in brightness or color between
channels. Instance normalization++ puts the means back in standardized form. With :math:`\mu_c, \sigma_c` the spatial
mean and standard deviation of channel c of one image, m and v the mean and variance of :math:`\mu` over the channels,

.. math:: \gamma_c \Bigl( \frac{x_c - \mu_c}{\sigma_c} + \alpha_c \frac{\mu_c - m}{\sqrt{v}} \Bigr) + \beta_c.

The form is that of the published weights: alpha stands inside gamma, v is the unbiased variance, and both variances
carry 1e-5. (The paper writes alpha outside gamma; weights trained on one form do not work in the other.) Everything is
computed within one image, so a network of these layers treats the images of a batch independently.

Every norm takes the activation that follows it: in half precision a norm that nobody differentiates widens its input to
its own parameters' float32 once, and what comes after it happens before the result is rounded.

Group normalization is torch's, computed in another way where torch's is slow: in channels_last, the layout in which
convolutions are fastest, and in half precision, torch's kernels for the CPU take two to seven times as long backward,
and at small images two to four times as long forward, as the same formula in a few passes over parts of the batch that
fit the caches.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. A.
    Dumoulin et al., 2017, A Learned Representation for Artistic Style, arXiv:1610.07629 (the conditional form).
    Wu & He, 2018, Group Normalization, arXiv:1803.08494.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_EPS = 1e-5
Activation = Callable[[Tensor], Tensor]


def structure(net: nn.Module) -> dict[str, type | None]:
    """What a network is made of: the kind of each of its modules, and the names of its parameters."""
    kinds: dict[str, type | None] = {name: type(module) for name, module in net.named_modules()}
    return {**kinds, **dict.fromkeys(name for name, _ in net.named_parameters())}


def _widened(x: Tensor, parameter: Tensor) -> Tensor:
    """The input in its norm's dtype where that is wider. Not in training: autograd would keep the wide copy."""
    training = torch.is_grad_enabled() and torch.is_autocast_enabled(x.device.type)
    return x.to(parameter.dtype) if x.element_size() < parameter.element_size() and not training else x


def _activated(y: Tensor, activation: Activation | None, dtype: torch.dtype) -> Tensor:
    return (y if activation is None else activation(y)).to(dtype)


def _instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The formula above for x (N, C, H, W) and parameters of shape (C,) or (N, C)."""
    # Half precision has too few digits for sums over thousands of pixels: statistics are accumulated in float32.
    stats = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((2, 3), dtype=stats)  # (N, C)
    # The two-pass variance with its correction (Chan, Golub & LeVeque 1983). A constant channel is multiplied by
    # 1/sqrt(1e-5) below, rounding included; the mean of what is left takes the rounding of the first mean away.
    x = x - mean.to(x.dtype)[..., None, None]
    rest = x.mean((2, 3), dtype=stats)
    var = x.square().mean((2, 3), dtype=stats) - rest.square()
    mean = mean + rest
    v, m = torch.var_mean(mean, dim=1, keepdim=True)  # (N, 1)
    scale = gamma * torch.rsqrt(var + _EPS)
    shift = gamma * alpha * (mean - m) * torch.rsqrt(v + _EPS) + beta - scale * rest
    return torch.addcmul(shift.to(x.dtype)[..., None, None], x, scale.to(x.dtype)[..., None, None])


class InstanceNormPlus(nn.Module):
    """Instance normalization++ with one set of parameters, (N, C, H, W) -> the same shape.

    The second argument of ``forward`` is ignored; it is there so that this layer and the conditional one are called
    alike.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.gamma = nn.Parameter(torch.empty(channels).normal_(1, 0.02))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(  # noqa: D102
        self, x: Tensor, position: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        y = _instance_norm_plus(_widened(x, self.gamma), self.gamma, self.alpha, self.beta)
        return _activated(y, activation, x.dtype)


class ConditionalInstanceNormPlus(nn.Module):
    """Instance normalization++ whose parameters depend on the noise level, (N, C, H, W) -> the same shape.

    One table holds a row [gamma | alpha | beta] for each of the ladder's levels. ``position`` is the index of the
    level, () or (N,), and may be fractional: between two levels the rows are interpolated linearly.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(levels, 3 * channels)
        nn.init.normal_(self.embed.weight[:, : 2 * channels].detach(), 1, 0.02)
        nn.init.zeros_(self.embed.weight[:, 2 * channels :].detach())

    def forward(self, x: Tensor, position: Tensor, activation: Activation | None = None) -> Tensor:  # noqa: D102
        y = _instance_norm_plus(_widened(x, self.embed.weight), *self.rows(position))
        return _activated(y, activation, x.dtype)

    def rows(self, position: Tensor) -> tuple[Tensor, ...]:
        """gamma, alpha and beta at a position in the ladder, each (C,) or (N, C)."""
        table = self.embed.weight
        lower = position.floor().long().clamp(0, len(table) - 1)
        upper = (lower + 1).clamp(max=len(table) - 1)
        fraction = (position - lower).to(table.dtype)[..., None]
        return torch.lerp(table[lower], table[upper], fraction).chunk(3, dim=-1)


# Torch's own forward is fast in channels_last from this many pixels on, and in half precision too.
_NATIVE_PIXELS = 1024
# From this many on, a float32 copy of half precision leaves the caches: the norm is rounded once more instead.
_LARGE_PIXELS = 4096
# Values that each thread works on at once: a megabyte of float32.
_PART_VALUES = 2**18


class GroupNorm(nn.GroupNorm):
    """Group normalization, (N, C, H, W) -> the same shape: ``torch.nn.GroupNorm``, fast in channels_last on a CPU.

    ``level`` (N, C, 1, 1) is added before, ``activation`` taken after.
    """

    def forward(  # noqa: D102
        self, x: Tensor, activation: Activation | None = None, level: Tensor | None = None
    ) -> Tensor:
        y = x if x.shape[2:].numel() >= _LARGE_PIXELS else _widened(x, self.weight)
        if y is not x:  # memory of our own, and float32, in which torch's own kernel is fast at every size
            y = y if level is None else y.add_(level)
            return _activated(super().forward(y), activation, x.dtype)
        y = y if level is None else y + level.to(y.dtype)
        channels_last = y.ndim == 4 and y.stride(1) == 1 and not y.is_contiguous()  # asked so, vmap has an answer
        if y.device.type != "cpu" or not channels_last:
            y = super().forward(y)
        else:
            y = _GroupNorm.apply(y, self.weight, self.bias, self.num_groups, self.eps)[0]  # type: ignore[no-untyped-call]
        return _activated(y, activation, x.dtype)


def _by_parts(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """What a function makes of a batch, (N, ...) each, part by part, so that what lies between stays in caches."""
    part = max(1, _PART_VALUES * torch.get_num_threads() // tensors[0][0].numel())
    if part >= len(tensors[0]):
        return function(*tensors)
    results = [function(*parts) for parts in zip(*(tensor.split(part) for tensor in tensors), strict=True)]
    return tuple(torch.cat(whole) for whole in zip(*results, strict=True))


def _over_groups(means: Tensor, groups: int) -> Tensor:
    """Means of channels (N, C) -> the means of their groups, (N, C) again."""
    n, channels = means.shape
    of_groups = means.reshape(n, groups, channels // groups).mean(-1, keepdim=True)
    return of_groups.expand(-1, -1, channels // groups).reshape(n, channels)


def _moments(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The mean and the inverse standard deviation of each channel's group, (N, C) float32, and x less that mean."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = _over_groups(x.mean((2, 3)), groups)
    centered = x - mean[..., None, None]
    return mean, torch.rsqrt(_over_groups((centered * centered).mean((2, 3)), groups) + eps), centered


class _GroupNorm(torch.autograd.Function):
    r"""Group norm in a few passes over the tensor, and its backward in as many.

    With :math:`\hat x = (x - \mu) r`, g the gradient of the output and [.] the mean over a group,
    the gradient is :math:`r\,(\gamma g - [\gamma g] - \hat x\,[\gamma g \hat x])`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        stats = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = weight.to(stats), bias.to(stats)
        if x.shape[2] * x.shape[3] >= _NATIVE_PIXELS:
            n, channels, height, width = x.shape
            y, mean, rstd = torch.native_group_norm(x, gamma, beta, n, channels, height * width, groups, eps)
            repeats = channels // groups
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
            if torch.is_grad_enabled():  # somebody differentiates the gradient: the statistics must follow from x
                mean, rstd, _ = _moments(x, ctx.groups, ctx.eps)
            g, wide = g.to(rstd.dtype), x.to(rstd.dtype)
            of_bias = g.mean((2, 3))
            of_weight = ((g * wide).mean((2, 3)) - mean * of_bias) * rstd  # the mean of g times the normalized x
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
