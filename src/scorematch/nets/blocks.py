r"""The common parts of the U-Nets: residual blocks, attention, resampling by two, and the embedding of the noise level.

Every residual block receives the embedding of the noise level, a vector that two linear layers compute from sines and
cosines of c_noise. Submodules have the names of diffusers.

References:
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    Song et al., 2021, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456.
    Zhang, 2019, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486 (the filter).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.messages import quote
from scorematch.nets.layers import GroupNorm
from scorematch.nets.space import Space

SQRT2 = math.sqrt(2)
_NULL = 1e-4  # a value that is not zero in half precision, and has no effect beside an embedding


def quarter_groups(channels: int) -> int:
    """The number of groups in NCSN++ and EDM: a quarter of the channels, but at most 32.

    Raises:
        ValueError: if it does not divide the number of channels.
    """
    groups = min(channels // 4, 32)
    if groups < 1 or channels % groups:
        raise ValueError(
            "the widths of scales, and their sums where features are concatenated, must be multiples of 4 up to 128 "
            f"and multiples of 32 above, got {channels} channels."
        )
    return groups


# -- Resampling by two ------------------------------------------------------------------------------------------------


class Filter(nn.Module):
    """A separable symmetric filter with a sum of one, (N, C, H, W) -> (N, C, H', W').

    Args:
        taps: the values of the filter along one axis, up to a factor.
        stride: the stride; 2 halves height and width.
        padding: the number of zeros on each side.
    """

    kernel: Tensor

    def __init__(self, taps: tuple[int, ...] = (1, 3, 3, 1), *, stride: int = 2, padding: int = 1) -> None:
        super().__init__()
        self.taps, self.stride, self.padding = taps, stride, padding
        self.register_buffer("kernel", torch.empty(0), persistent=False)
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Computes the kernel, which is not stored with the weights."""
        total = sum(self.taps) ** 2
        self.kernel = torch.tensor([[[[a * b / total for b in self.taps] for a in self.taps]]], device=device)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(x, kernel, stride=self.stride, padding=self.padding, groups=x.shape[1])


def fir_up(x: Tensor, margin: int = 0) -> Tensor:
    """Upsamples by two: inserts zeros between the pixels, then applies the filter (1, 3, 3, 1) with a sum of four.

    This is computed as linear interpolation between pixels, with zeros outside the image. A transposed convolution took
    up to twenty times as long in bfloat16.

    Args:
        x: images or features (N, C, H, W).
        margin: the number of additional pixels on each side of the result, 0 or 1.

    Returns:
        (N, C, 2 H + 2 margin, 2 W + 2 margin).
    """
    cut = 2 - margin
    return F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2.0, mode="bilinear")[..., cut:-cut, cut:-cut]


# -- Blocks -----------------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """The settings that the blocks of one network share."""

    embedding: int  # the width of the embedding of the noise level
    eps: float
    dropout: float
    activation: Callable[[Tensor], Tensor]
    scale_shift: bool = False  # whether the noise level scales and shifts the result of the second norm, or is added
    groups: int | None = None  # of group norms; None is ``quarter_groups``
    scale: float = 1.0  # the divisor of sums
    space: Space = Space()

    def groups_of(self, channels: int) -> int:
        """The number of groups of a norm."""
        return quarter_groups(channels) if self.groups is None else self.groups

    def attention(self, channels: int, head_width: int, groups: int | None) -> Attention:
        """Attention with these settings; without a norm if ``groups`` is None."""
        return Attention(channels, head_width=head_width, groups=groups, eps=self.eps, scale=self.scale)


class ResidualBlock(nn.Module):
    """norm, activation, conv, noise level, norm, activation, conv, added to the input; optionally with resampling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: Style,
        *,
        groups: int | None = None,
        resample: Callable[[Tensor], Tensor] | None = None,
        shortcut: bool = False,
    ) -> None:
        super().__init__()
        self.style, self.resample = style, resample
        self.norm1 = GroupNorm(style.groups_of(inputs) if groups is None else groups, inputs, style.eps)
        self.conv1 = style.space.conv(inputs, outputs)
        self.time_emb_proj = nn.Linear(style.embedding, 2 * outputs if style.scale_shift else outputs)
        self.norm2 = GroupNorm(style.groups_of(outputs), outputs, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = style.space.conv(outputs, outputs)
        self.conv_shortcut = style.space.conv(inputs, outputs, 1) if shortcut or inputs != outputs else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # noqa: D102
        act = self.style.activation
        h = self.norm1(x, act)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        level = self.time_emb_proj(embedding)
        level = level.view(*level.shape, *[1] * (x.ndim - 2))
        if self.style.scale_shift:
            scale, shift = level.chunk(2, dim=1)
            h = act(self.norm2(h) * (1 + scale) + shift).to(h.dtype)
        else:
            h = self.norm2(h, act, level)
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.style.scale == 1 else (x + h) / self.style.scale


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input."""

    def __init__(self, channels: int, *, head_width: int, groups: int | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        if head_width > channels:
            raise ValueError(
                f"attention_head_dim must be at most {channels}, the width of the scale, got {head_width}."
            )
        self.heads, self.scale = channels // head_width, scale
        inner = self.heads * head_width
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        h = (x if self.group_norm is None else self.group_norm(x)).movedim(1, -1).flatten(1, -2)  # (N, pixels, C)
        if isinstance(self.to_k, nn.Identity) and h.device.type != "cpu":
            h = h.contiguous()  # after ``fold`` h is k and v, and fused kernels need a contiguous last axis
        q, k, v = (
            project(h).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, heads, pixels, C)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = self.to_out[0](h).unflatten(1, x.shape[2:]).movedim(-1, 1)
        return x + h if self.scale == 1 else (x + h) / self.scale

    def fold(self) -> None:
        r"""Reduces the four projections to two, in place, if there is one head; for inference only.

        Up to a term that is equal for all j, which the softmax removes, the product of query i and key j is
        :math:`(W_q x_i + b_q)^\top (W_k x_j + b_k) = (W_k^\top W_q x_i + W_k^\top b_q)^\top x_j`, so that the pixels
        themselves can be used as keys. The attention weights sum to one, so that :math:`W_v` can be applied after the
        weighted mean, and the pixels can be used as values. The weights can then no longer be saved and loaded.
        """
        q, k, v = self.to_q, self.to_k, self.to_v
        if self.heads != 1 or q.weight.shape[0] != q.in_features:
            return
        out = cast(nn.Linear, self.to_out[0])
        out.bias.copy_(out.bias + out.weight @ v.bias)
        out.weight.copy_(out.weight @ v.weight)
        q.bias.copy_(k.weight.T @ q.bias)
        q.weight.copy_(k.weight.T @ q.weight)
        self._modules.update(to_k=nn.Identity(), to_v=nn.Identity())


class MiddleBlock(nn.Module):
    """Residual block, attention or nothing, residual block, at the lowest resolution."""

    def __init__(self, resnets: Sequence[ResidualBlock], attention: Attention | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = None if attention is None else nn.ModuleList([attention])

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:  # noqa: D102
        h = self.resnets[0](h, embedding)
        if self.attentions is not None:
            h = self.attentions[0](h)
        return self.resnets[1](h, embedding)


class DownBlock(nn.Module):
    """Residual blocks, each optionally followed by attention, then downsampling; the base class of all blocks down.

    A subclass may set the modules that are None or empty here: ``downsamplers``, one module that downsamples; or
    ``resnet_down``, and ``skip_conv`` with ``image_down`` for an input pyramid.
    """

    def __init__(
        self, inputs: int, outputs: int, layers: int, style: Style, attention: Callable[[], Attention] | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, style) for i in range(layers))
        self.attentions = nn.ModuleList() if attention is None else nn.ModuleList(attention() for _ in range(layers))
        self.downsamplers: nn.ModuleList | None = None
        self.resnet_down: nn.Module | None = None
        self.skip_conv: nn.Module | None = None
        self.image_down: Callable[[Tensor], Tensor]
        self.sum_divisor: float | None = None  # of an input pyramid that is a running sum of the image and the features

    def forward(self, h: Tensor, embedding: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The output, all features that are kept for the way up, and the image for the next block."""
        outputs = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            h = self.attentions[i](h) if self.attentions else h
            outputs.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h, embedding)
        elif self.resnet_down is not None:
            h = self.resnet_down(h, embedding)
        else:
            return h, outputs, image
        if self.skip_conv is not None:
            image = self.image_down(image)
            h = self.skip_conv(image) + h
            if self.sum_divisor is not None:
                h = image = h / self.sum_divisor
        return h, [*outputs, h], image


class UpBlock(nn.Module):
    """Residual blocks on the features and those of the way down, then upsampling; the base class of all blocks up.

    Attention follows each of the last residual blocks, as many as there are ``attentions``. A subclass may set the
    modules that are None here: ``upsamplers``, one module that upsamples, or ``resnet_up``; ``picture_up``, which
    upsamples the picture of an output pyramid; and ``skip_conv``, which computes what is added to the picture from the
    features and ``skip_norm``, or without ``skip_norm`` what is added to the features from the picture.
    """

    def __init__(self, resnets: Iterable[ResidualBlock], attentions: Iterable[Attention]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)
        self.upsamplers: nn.ModuleList | None = None
        self.resnet_up: nn.Module | None = None
        self.picture_up: Callable[[Tensor], Tensor] | None = None
        self.skip_norm: nn.Module | None = None
        self.skip_conv: nn.Module | None = None
        self.sum_divisor = 1.0  # of an output pyramid that is a running sum of the picture and the features

    def forward(
        self, h: Tensor, kept: list[Tensor], embedding: Tensor, picture: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output, and the picture for the next block; features are removed from ``kept``."""
        plain = len(self.resnets) - len(self.attentions)
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, kept.pop()], dim=1), embedding)
            h = h if i < plain else self.attentions[i - plain](h)
        if picture is not None and self.picture_up is not None:
            picture = self.picture_up(picture)
        if self.skip_conv is not None and self.skip_norm is not None:
            addend = self.skip_conv(self.skip_norm(h, F.silu))
            picture = addend if picture is None else picture + addend
        elif self.skip_conv is not None and picture is not None:
            h = picture = (self.skip_conv(picture) + h) / self.sum_divisor
        if self.upsamplers is not None:
            h = self.upsamplers[0](h, embedding)
        return h if self.resnet_up is None else self.resnet_up(h, embedding), picture


# -- The noise level --------------------------------------------------------------------------------------------------


class Positional(nn.Module):
    """(N,) -> (N, width): cosines and sines of c_noise times a factor, at geometric frequencies from 1 to 1/10,000."""

    def __init__(self, width: int, *, cosines_first: bool, freq_shift: float, factor: float = 1.0) -> None:
        super().__init__()
        self.width, self.cosines_first, self.freq_shift, self.factor = width, cosines_first, freq_shift, factor

    def forward(self, c_noise: Tensor) -> Tensor:  # noqa: D102
        c_noise = c_noise * self.factor
        half = self.width // 2
        exponent = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device) / (half - self.freq_shift)
        argument = c_noise[:, None] * torch.exp(-math.log(10_000) * exponent)
        parts = [argument.cos(), argument.sin()] if self.cosines_first else [argument.sin(), argument.cos()]
        return F.pad(torch.cat(parts, dim=1), (0, self.width % 2))


class Fourier(nn.Module):
    """(N,) -> (N, width): sines and cosines of c_noise at fixed random frequencies.

    The frequencies stay in float32 if a network is converted to half precision, where rounding them would change the
    phases of the sines.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"the number of sines and cosines, time_proj_dim, must be even, got {width}.")
        frequencies = torch.empty(width // 2)
        if not frequencies.is_meta:  # there torch would import its compiler
            frequencies.normal_(0, 16)
        self.weight = nn.Parameter(frequencies, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        """Converts the module; torch calls this method for ``net.half()``, ``net.to(...)`` and the like."""
        exact = self.weight.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.itemsize < exact.itemsize:
            self.weight.data = exact.to(self.weight.device, torch.float32)
        return self

    def forward(self, c_noise: Tensor) -> Tensor:  # noqa: D102
        # Arguments reach a thousand, where float32 rounds to 1e-4: the products are in the same order as in training.
        argument = c_noise[:, None] * self.weight.to(c_noise.dtype) * (2 * math.pi)
        return torch.cat([argument.sin(), argument.cos()], dim=1)


class Embedding(nn.Module):
    """The embedding of the noise level: two linear layers on its sines and cosines."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.linear_2(F.silu(self.linear_1(x)))


class VectorEmbedding(nn.Module):
    """The embedding of a vector (N, K) as the condition, (N, width); a vector with NaN stands for no condition.

    The values are standardized with ``mean`` and ``std`` (``ScoreNet.fit_units``), which are stored with the weights.
    With an ``encoder`` they are its features (N, K) of a condition (N, ...) of any shape; (N, 0) is no condition.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, values: int, width: int, encoder: nn.Module | None = None) -> None:
        super().__init__()
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(
                f"condition_encoder must be a torch.nn.Module, which is trained with the network, got {quote(encoder)}."
            )
        self.encoder = encoder
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("std", torch.ones(values))
        self.embedding = Embedding(values, width)
        self.null = nn.Parameter(torch.zeros(width))

    def forward(self, vector: Tensor) -> Tensor:  # noqa: D102
        if vector.shape[1] == 0:
            return self.null.expand(vector.shape[0], -1)
        missing = vector.flatten(1).isnan().any(1, keepdim=True)
        if self.encoder is not None:
            vector = self.encoder(torch.where(missing.view(-1, *[1] * (vector.ndim - 1)), 0, vector))
            if vector.shape != (missing.shape[0], len(self.mean)):
                raise ValueError(
                    f"condition_encoder must return features {(len(missing), len(self.mean))}, of condition_features "
                    f"values, got shape {tuple(vector.shape)}."
                )
        embedded = self.embedding((torch.where(missing, self.mean, vector) - self.mean) / self.std)
        return torch.where(missing, self.null, embedded)


def without_trained_null(backbone: nn.Module) -> bool:
    """Whether a network of vectors was trained without ``label_drop``: its embedding of none is zero."""
    nulls = [module.null for module in backbone.modules() if isinstance(module, VectorEmbedding)]
    return any(not null.is_meta and not null.any() for null in nulls)


def begin_null(backbone: nn.Module) -> None:
    """Moves an embedding of none away from zero, since a training with ``label_drop`` begins."""
    for module in backbone.modules():
        if isinstance(module, VectorEmbedding) and not module.null.any():
            nn.init.constant_(module.null, _NULL)


class AugmentationEmbedding(nn.Module):
    """Adds W c to the embedding of the noise level (N, width), where c (N, K) says how the images were augmented.

    W is zero at first. c is set before the network is called.
    """

    c: Tensor

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, values, width, bias=False)  # which draws no random numbers
        nn.init.zeros_(self.linear.weight)

    def forward(self, embedding: Tensor) -> Tensor:  # noqa: D102
        return embedding + self.linear(self.c.to(embedding.dtype))


class Constant(nn.Module):
    """Replaces a module that depends on the noise level only; returns the output of that module for one level."""

    value: Tensor

    def forward(self, *_: Tensor) -> Tensor:  # noqa: D102
        return self.value


def fix_projections(copy: nn.Module) -> Callable[[Tensor], None]:
    """Replaces the projections of the noise level in the residual blocks of a copy by constants.

    Returns:
        A function that sets these constants to the outputs of the projections for an embedding.
    """
    pairs = []
    for block in copy.modules():
        if isinstance(block, ResidualBlock):
            constant = Constant()
            pairs.append((block.time_emb_proj, constant))
            block._modules["time_emb_proj"] = constant

    def set_constants(embedding: Tensor) -> None:
        for projection, constant in pairs:
            constant.value = projection(embedding)

    return set_constants
