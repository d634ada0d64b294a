r"""The normalization layers: instance normalization++ of the NCSN family, and group normalization.

Instance normalization removes the mean of each channel, and with it all differences in brightness or color between
channels. Instance normalization++ adds the means back in standardized form. Let :math:`\mu_c, \sigma_c` be the spatial
mean and standard deviation of channel c of one image, and m and v the mean and variance of :math:`\mu` over the
channels. The result is

.. math:: \gamma_c \Bigl( \frac{x_c - \mu_c}{\sigma_c} + \alpha_c \frac{\mu_c - m}{\sqrt{v}} \Bigr) + \beta_c.

This is the form that the published weights need: gamma multiplies alpha, v is the unbiased variance, and 1e-5 is added
to both variances. (In the paper gamma does not multiply alpha; weights trained with one form do not work in the other.)
The statistics are those of a single image, so the images of a batch are processed independently.

Every layer takes the activation that follows it as an argument. Without autograd, half-precision input is normalized in
float32 and rounded only once, after the activation, which is then computed in place.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. A.
    Dumoulin et al., 2017, A Learned Representation for Artistic Style, arXiv:1610.07629 (the conditional form).
    Wu & He, 2018, Group Normalization, arXiv:1803.08494.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.nets.group_norm import group_norm_channels_last

_EPS = 1e-5
Activation = Callable[..., Tensor]
_HAS_IN_PLACE = (F.silu, F.elu, F.mish, F.relu)


def _autocast(x: Tensor) -> bool:
    """Whether autocast is enabled for the device type of x."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # the compiler of torch 2.5 has no is_autocast_available


def _widened(x: Tensor, parameter: Tensor) -> Tensor:
    """Converts the input to the dtype of the parameter if that is wider, except in training under autocast.

    There autograd would keep the wider copy in memory for the backward pass.
    """
    training = torch.is_grad_enabled() and _autocast(x)
    return x.to(parameter.dtype) if x.element_size() < parameter.element_size() and not training else x


def _activated(y: Tensor, activation: Activation | None, dtype: torch.dtype) -> Tensor:
    """Applies the activation to the output y of a norm, in place if possible, since y has no other users."""
    if activation is None:
        return y.to(dtype)
    # torch.jit.trace compares a graph that it records with gradients to one without.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    in_place = activation in _HAS_IN_PLACE and not torch.is_grad_enabled() and not tracing
    return (activation(y, inplace=True) if in_place else activation(y)).to(dtype)


def _instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The formula above for x (N, C, H, W) and parameters of shape (C,) or (N, C)."""
    # Half precision is too inaccurate for sums over thousands of pixels: statistics are accumulated in float32.
    stats = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean((2, 3), dtype=stats)  # (N, C)
    # The corrected two-pass variance (Chan, Golub & LeVeque 1983). A constant channel is multiplied by 1/sqrt(1e-5)
    # below, and so are its rounding errors; the second mean removes the rounding error of the first.
    x = x - mean.to(x.dtype)[..., None, None]
    rest = x.mean((2, 3), dtype=stats)
    squares = x.to(stats).square() if x.dtype == torch.float16 else x.square()  # float16 overflows from 256^2 on
    var = squares.mean((2, 3), dtype=stats) - rest.square()
    mean = mean + rest
    v, m = torch.var_mean(mean, dim=1, keepdim=True)  # (N, 1)
    scale = gamma * torch.rsqrt(var + _EPS)
    shift = gamma * alpha * (mean - m) * torch.rsqrt(v + _EPS) + beta - scale * rest
    return torch.addcmul(shift.to(x.dtype)[..., None, None], x, scale.to(x.dtype)[..., None, None])


def _near_one(parameter: Tensor) -> Tensor:
    """Initializes with mean 1 and standard deviation 0.02, as the authors do; does nothing on the meta device."""
    return parameter if parameter.is_meta else parameter.normal_(1, 0.02)


class InstanceNormPlus(nn.Module):
    """Instance normalization++ with one set of parameters, (N, C, H, W) -> the same shape.

    The second argument of ``forward`` is ignored; it exists so that the conditional layer is called in the same way.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(_near_one(torch.empty(channels)))
        self.gamma = nn.Parameter(_near_one(torch.empty(channels)))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(  # noqa: D102
        self, x: Tensor, position: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        y = _instance_norm_plus(_widened(x, self.gamma), self.gamma, self.alpha, self.beta)
        return _activated(y, activation, x.dtype)


class ConditionalInstanceNormPlus(nn.Module):
    """Instance normalization++ whose parameters depend on the noise level, (N, C, H, W) -> the same shape.

    One table has a row [gamma | alpha | beta] for each level of the schedule. ``position`` is the index of the level,
    () or (N,), and may be fractional: between two levels the rows are interpolated linearly.
    """

    fixed: tuple[Tensor, ...] | None = None  # in an inference copy, gamma, alpha and beta of its noise level

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        table = torch.zeros(levels, 3 * channels)
        _near_one(table[:, : 2 * channels])
        self.embed = nn.Embedding(levels, 3 * channels, _weight=table)

    def forward(self, x: Tensor, position: Tensor, activation: Activation | None = None) -> Tensor:  # noqa: D102
        rows = self.rows(position) if self.fixed is None else self.fixed
        y = _instance_norm_plus(_widened(x, self.embed.weight), *rows)
        return _activated(y, activation, x.dtype)

    def rows(self, position: Tensor) -> tuple[Tensor, ...]:
        """gamma, alpha and beta at a position in the schedule, each (C,) or (N, C)."""
        last = self.embed.num_embeddings - 1
        lower = position.floor().long().clamp(0, last)
        upper = (lower + 1).clamp(max=last)
        fraction = (position - lower).to(self.embed.weight.dtype)[..., None]
        # An embedding selects rows on the device; indexing with a 0-d tensor would copy its value to the CPU.
        return torch.lerp(self.embed(lower), self.embed(upper), fraction).chunk(3, dim=-1)


# From this many pixels on, a float32 copy of half-precision data does not fit into the caches. Such data are normalized
# in half precision, which rounds them once more.
_LARGE_PIXELS = 4096


class GroupNorm(nn.GroupNorm):
    """Group normalization, (N, C, H, W) -> the same shape: ``torch.nn.GroupNorm``, fast in channels_last on a CPU.

    ``level`` (N, C, 1, 1) is added to the input, and ``activation`` is applied to the result.

    Raises:
        ValueError: if the number of groups does not divide the number of channels.
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-5) -> None:
        if groups < 1 or channels % groups:
            raise ValueError(
                f"the number of groups of a norm, norm_num_groups, must divide its {channels} channels, got {groups}."
            )
        super().__init__(groups, channels, eps)

    def forward(  # noqa: D102
        self, x: Tensor, activation: Activation | None = None, level: Tensor | None = None
    ) -> Tensor:
        y = x if x.shape[2:].numel() >= _LARGE_PIXELS else _widened(x, self.weight)
        if y is not x:  # y is a new tensor in float32, for which torch's own kernel is fast at every size
            y = y if level is None else y.add_(level)
            return _activated(super().forward(y), activation, x.dtype)
        y = y if level is None else y + level.to(y.dtype)
        channels_last = y.ndim == 4 and y.stride(1) == 1 and not y.is_contiguous()  # by strides: vmap supports it
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if y.device.type == "cpu" and channels_last and not torch.compiler.is_compiling():  # a compiler fuses its own
            y = group_norm_channels_last(y, weight, bias, self.num_groups, self.eps)
        elif y.device.type == "cpu":  # its kernel supports mixed dtypes
            y = F.group_norm(y, self.num_groups, weight, bias, self.eps)
        else:
            weight, bias = weight.to(y.dtype), bias.to(y.dtype)
            if _autocast(y):  # for F.group_norm, autocast would keep a float32 copy of y for the backward pass
                n, channels = y.shape[:2]
                pixels, groups, eps = y.shape[2:].numel(), self.num_groups, self.eps
                y = torch.native_group_norm(y.contiguous(), weight, bias, n, channels, pixels, groups, eps)[0]
            else:
                y = F.group_norm(y, self.num_groups, weight, bias, self.eps)
        return _activated(y, activation, x.dtype)
