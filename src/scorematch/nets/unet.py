r"""The U-Net of DDPM and of NCSN++, with the names and options of diffusers.

At each scale there are residual blocks with group norm, and attention at some scales, on the way down to low
resolution and again on the way up, where the features of the way down are concatenated. The noise level enters every
residual block as a vector, made of

- sines and cosines of c_noise at geometric frequencies ("positional", DDPM: c_noise is the time step), or
- sines and cosines at random frequencies, :math:`2 \pi w c_{noise}` ("fourier", NCSN++: c_noise is log sigma).

The blocks named Skip are NCSN++'s: the image itself is downsampled beside the features and added to them at each
scale, and the output image is summed over the scales on the way up. They resample with the filter (1, 3, 3, 1) and
divide sums by :math:`\sqrt 2`.

With ``patch`` = p the network works on patches of p x p pixels, which become channels (space to depth) before the first
convolution and pixels again after the last. A network on 2 x 2 patches takes about a quarter of the time. Nothing in it
works at single pixels, which may leave grain in the pattern of the patches; ``pixel_channels`` adds one residual block
at full resolution before the patches are made and one after they become pixels again. This is an addition of this
package, and diffusers cannot run such a network.

Submodules and configuration have the names of diffusers, which are the format of the weights on the Hugging Face Hub.
Some choices look arbitrary (how a block counts its groups); they are fixed by the trained weights.

References:
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    Song et al., 2021, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456.
    Zhang, 2019, Making Convolutional Networks Shift-Invariant Again, arXiv:1904.11486 (the filter).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from scorematch.nets.family import Condition, Family, structure
from scorematch.nets.layers import GroupNorm
from scorematch.schema import Field

_SQRT2 = math.sqrt(2)


class _Kind(NamedTuple):
    """The properties of a kind of block."""

    attention: bool = False
    skip: bool = False  # of NCSN++: the image is resampled beside the features
    residual: bool = False  # resampled by a residual block instead of a convolution


DOWN_BLOCKS = {
    "DownBlock2D": _Kind(),
    "AttnDownBlock2D": _Kind(attention=True),
    "ResnetDownsampleBlock2D": _Kind(residual=True),
    "SkipDownBlock2D": _Kind(skip=True),
    "AttnSkipDownBlock2D": _Kind(attention=True, skip=True),
}
UP_BLOCKS = {
    "UpBlock2D": _Kind(),
    "AttnUpBlock2D": _Kind(attention=True),
    "ResnetUpsampleBlock2D": _Kind(residual=True),
    "SkipUpBlock2D": _Kind(skip=True),
    "AttnSkipUpBlock2D": _Kind(attention=True, skip=True),
}

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


def _quarter_groups(channels: int) -> int:
    """NCSN++'s number of groups."""
    return min(channels // 4, 32)


# -- Resampling by two ------------------------------------------------------------------------------------------------


class _FIRDown(nn.Module):
    """The filter (1, 3, 3, 1) x (1, 3, 3, 1), normalized to a sum of one, at every other pixel."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.empty(0), persistent=False)
        self.reset_buffers(torch.get_default_device())

    def reset_buffers(self, device: torch.device) -> None:
        """Computes the kernel, which is not stored with the weights."""
        line = (1, 3, 3, 1)
        self.kernel = torch.tensor([[[[a * b / 64 for b in line] for a in line]]], device=device)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=x.shape[1])


def _fir_up(x: Tensor) -> Tensor:
    """Inserts zeros between the pixels, then applies that filter with a sum of four.

    This is linear interpolation between pixels, with zeros beyond the border. A transposed convolution took up to
    twenty times as long in bfloat16.
    """
    return F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2.0, mode="bilinear")[..., 2:-2, 2:-2]


def _mean_down(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _nearest_up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Downsample(nn.Module):
    """A convolution of stride two. DDPM's (padding 0) pads on the right and below only."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.uneven = padding == 0

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.uneven else x)


class _Upsample(nn.Module):
    """Repeats each pixel twice in each direction, then applies a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(_nearest_up(x))


# -- Blocks -----------------------------------------------------------------------------------------------------------


class _Style(NamedTuple):
    """The settings that all residual blocks of one network share."""

    embedding: int  # width of the vector that represents the noise level
    eps: float
    dropout: float
    activation: Callable[[Tensor], Tensor]
    scale_shift: bool  # whether it scales and shifts the result of the second norm; if not, it is added before


class ResidualBlock(nn.Module):
    """norm, activation, conv, noise level, norm, activation, conv, added to the input; optionally resampled inside."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: _Style,
        *,
        groups: int,
        groups_out: int | None = None,
        scale: float = 1.0,
        resample: Callable[[Tensor], Tensor] | None = None,
        shortcut: bool | None = None,
    ) -> None:
        super().__init__()
        self.style, self.scale, self.resample = style, scale, resample
        self.norm1 = GroupNorm(groups, inputs, style.eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(style.embedding, 2 * outputs if style.scale_shift else outputs)
        self.norm2 = GroupNorm(groups if groups_out is None else groups_out, outputs, style.eps)
        self.dropout = nn.Dropout(style.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        shortcut = inputs != outputs if shortcut is None else shortcut
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if shortcut else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # noqa: D102
        act = self.style.activation
        h = self.norm1(x, act)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        level = self.time_emb_proj(embedding)[:, :, None, None]
        if self.style.scale_shift:
            scale, shift = level.chunk(2, dim=1)
            h = act(self.norm2(h) * (1 + scale) + shift).to(h.dtype)
        else:
            h = self.norm2(h, act, level)
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return x + h if self.scale == 1 else (x + h) / self.scale


class Attention(nn.Module):
    """Self-attention over the pixels, added to the input."""

    def __init__(self, channels: int, *, head_width: int, groups: int | None, eps: float, scale: float = 1.0) -> None:
        super().__init__()
        self.heads, self.scale = channels // head_width, scale
        inner = self.heads * head_width
        self.group_norm = None if groups is None else GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        height, width = x.shape[2:]
        h = rearrange(x if self.group_norm is None else self.group_norm(x), "n c h w -> n (h w) c")
        q, k, v = (
            rearrange(project(h), "n p (heads c) -> n heads p c", heads=self.heads)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "n heads p c -> n p (heads c)")
        h = rearrange(self.to_out[0](h), "n (h w) c -> n c h w", h=height, w=width)
        return x + h if self.scale == 1 else (x + h) / self.scale

    def fold(self) -> None:
        r"""With one head, takes the pixels themselves as keys and as values: two projections instead of four.

        The product of query and key is
        :math:`(W_q x_i + b_q)^\top (W_k x_j + b_k) = (W_k^\top W_q x_i + W_k^\top b_q)^\top x_j` plus a term that is
        the same for all j, which the softmax removes. Its weights sum to one, so that :math:`W_v` can be applied after
        the mean. The result is for inference: its weights are no longer those of the format.
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


class _Layout(NamedTuple):
    """The other settings that the blocks of one network share."""

    style: _Style
    groups: int | None  # None: a quarter of the channels, 32 at most
    head_width: int | None  # None: one head
    padding: int
    residual_resampling: tuple[bool, bool]  # by a residual block, on the way down and up, in blocks with attention
    channels: tuple[int, int]  # of the network's input and output

    def groups_of(self, channels: int) -> int:
        return _quarter_groups(channels) if self.groups is None else self.groups

    def attention(self, channels: int, groups: int | None, scale: float = 1.0) -> Attention:
        head_width = channels if self.head_width is None else self.head_width
        return Attention(channels, head_width=head_width, groups=groups, eps=self.style.eps, scale=scale)


class _DownBlock(nn.Module):
    """Residual blocks, each optionally followed by attention, then halving; the outputs are kept for the way up."""

    def __init__(self, kind: _Kind, inputs: int, outputs: int, layers: int, layout: _Layout, *, halve: bool) -> None:
        super().__init__()
        style = layout.style
        scale = _SQRT2 if kind.skip else 1.0
        self.resnets = nn.ModuleList()
        for i in range(layers):
            width = inputs if i == 0 else outputs
            groups = (
                (_quarter_groups(width), _quarter_groups(outputs)) if kind.skip else (layout.groups_of(width), None)
            )
            self.resnets.append(
                ResidualBlock(width, outputs, style, groups=groups[0], groups_out=groups[1], scale=scale)
            )
        self.attentions: nn.ModuleList | None = None
        if kind.attention:
            groups_of_attention = 32 if kind.skip else layout.groups_of(outputs)
            self.attentions = nn.ModuleList(
                layout.attention(outputs, groups_of_attention, scale) for _ in range(layers)
            )
        self.downsamplers: nn.ModuleList | None = None
        self.resnet_down: nn.Module | None = None
        self.skip_conv: nn.Module | None = None
        if halve and kind.skip:
            self.resnet_down = ResidualBlock(
                outputs,
                outputs,
                style,
                groups=_quarter_groups(outputs),
                scale=scale,
                resample=_FIRDown(),
                shortcut=True,
            )
            self.fir_down = _FIRDown()
            self.skip_conv = nn.Conv2d(layout.channels[0], outputs, 1)
        elif halve:
            sampler: nn.Module = _Downsample(outputs, layout.padding)
            if kind.residual or (kind.attention and layout.residual_resampling[0]):
                groups_down = layout.groups_of(outputs)
                sampler = ResidualBlock(outputs, outputs, style, groups=groups_down, resample=_mean_down)
            self.downsamplers = nn.ModuleList([sampler])

    def forward(self, h: Tensor, embedding: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        outputs = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, embedding)
            if self.attentions is not None:
                h = self.attentions[i](h)
            outputs.append(h)
        if self.downsamplers is not None:
            h = self.downsamplers[0](h, embedding)
            outputs.append(h)
        elif self.resnet_down is not None and self.skip_conv is not None:
            image = self.fir_down(image)
            h = self.skip_conv(image) + self.resnet_down(h, embedding)
            outputs.append(h)
        return h, outputs, image


class _MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(
        self, channels: int, layout: _Layout, *, scale: float, attention: bool, attention_groups: int | None
    ) -> None:
        super().__init__()
        groups = layout.groups_of(channels)
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, channels, layout.style, groups=groups, scale=scale) for _ in range(2)
        )
        if attention_groups is None and not layout.style.scale_shift:
            attention_groups = groups
        self.attentions = nn.ModuleList([layout.attention(channels, attention_groups, scale)]) if attention else None

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.resnets[0](h, embedding)
        if self.attentions is not None:
            h = self.attentions[0](h)
        return self.resnets[1](h, embedding)


class _UpBlock(nn.Module):
    """Residual blocks on the features and those kept on the way down, optionally with attention, then doubling."""

    def __init__(
        self,
        kind: _Kind,
        inputs: int,
        kept: Sequence[int],
        outputs: int,
        layout: _Layout,
        *,
        double: bool,
    ) -> None:
        super().__init__()
        style = layout.style
        scale = _SQRT2 if kind.skip else 1.0
        self.skip = kind.skip
        self.resnets = nn.ModuleList()
        for i, beside in enumerate(kept):
            below = inputs if i == 0 else outputs
            groups, groups_out = layout.groups_of(below + beside), None
            if kind.skip:
                # With attention the quarter is taken of the second summand only, as in the trained networks.
                groups = min(below + beside // 4, 32) if kind.attention else _quarter_groups(below + beside)
                groups_out = _quarter_groups(outputs)
            self.resnets.append(
                ResidualBlock(below + beside, outputs, style, groups=groups, groups_out=groups_out, scale=scale)
            )
        self.attentions: nn.ModuleList | None = None
        if kind.attention:
            count, groups_of_attention = (1, 32) if kind.skip else (len(kept), layout.groups_of(outputs))
            self.attentions = nn.ModuleList(layout.attention(outputs, groups_of_attention, scale) for _ in range(count))
        self.upsamplers: nn.ModuleList | None = None
        self.resnet_up: nn.Module | None = None
        self.skip_norm: nn.Module | None = None
        self.skip_conv: nn.Module | None = None
        if double and kind.skip:
            groups = _quarter_groups(outputs)
            self.resnet_up = ResidualBlock(
                outputs, outputs, style, groups=groups, scale=scale, resample=_fir_up, shortcut=True
            )
            self.skip_norm = GroupNorm(groups, outputs, style.eps)
            self.skip_conv = nn.Conv2d(outputs, layout.channels[1], 3, padding=1)
        elif double:
            sampler: nn.Module = _Upsample(outputs)
            if kind.residual or (kind.attention and layout.residual_resampling[1]):
                sampler = ResidualBlock(outputs, outputs, style, groups=layout.groups_of(outputs), resample=_nearest_up)
            self.upsamplers = nn.ModuleList([sampler])

    def forward(
        self, h: Tensor, kept: list[Tensor], embedding: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, kept.pop()], dim=1), embedding)
            if self.attentions is not None and len(self.attentions) == len(self.resnets):
                h = self.attentions[i](h)
        if self.attentions is not None and len(self.attentions) != len(self.resnets):
            h = self.attentions[0](h)
        if self.upsamplers is not None:
            h = self.upsamplers[0](h, embedding)
        if self.skip:
            image = None if image is None else _fir_up(image)
            if self.resnet_up is not None and self.skip_norm is not None and self.skip_conv is not None:
                picture = self.skip_conv(self.skip_norm(h, F.silu))
                image = picture if image is None else image + picture
                h = self.resnet_up(h, embedding)
        return h, image


# -- The noise level --------------------------------------------------------------------------------------------------


class _Positional(nn.Module):
    """(N,) -> (N, width): cosines and sines of c_noise at frequencies from 1 down to 1/10,000."""

    def __init__(self, width: int, *, cosines_first: bool, freq_shift: float) -> None:
        super().__init__()
        self.width, self.cosines_first, self.freq_shift = width, cosines_first, freq_shift

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.width // 2
        exponent = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device) / (half - self.freq_shift)
        argument = c_noise[:, None] * torch.exp(-math.log(10_000) * exponent)
        parts = [argument.cos(), argument.sin()] if self.cosines_first else [argument.sin(), argument.cos()]
        return F.pad(torch.cat(parts, dim=1), (0, self.width % 2))


class _Fourier(nn.Module):
    """(N,) -> (N, 2 width): sines and cosines of c_noise at fixed random frequencies."""

    def __init__(self, width: int, scale: float = 16.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).normal_(0, scale), requires_grad=False)

    def forward(self, c_noise: Tensor) -> Tensor:
        # Arguments reach a thousand, where float32 rounds to 1e-4: the order of the products is that of training.
        argument = c_noise[:, None] * self.weight.to(c_noise.dtype) * (2 * math.pi)
        return torch.cat([argument.sin(), argument.cos()], dim=1)


class _Embedding(nn.Module):
    """Two linear layers, whose input is the sines and cosines of the noise level."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, outputs)
        self.linear_2 = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class UNet(nn.Module):
    """The U-Net of DDPM and NCSN++. The arguments are the keys of a configuration on the Hub, with their defaults.

    Args:
        in_channels: of the input, including those of an image condition.
        out_channels: of the output.
        block_out_channels: width at each scale, from the image inward.
        down_block_types: the kind of block at each scale; see ``DOWN_BLOCKS``.
        up_block_types: likewise on the way up, from the lowest resolution outward; see ``UP_BLOCKS``.
        layers_per_block: residual blocks at each scale on the way down; one more on the way up.
        attention_head_dim: width of an attention head; None is one head.
        norm_num_groups: groups of the group norms; None is a quarter of the channels, 32 at most.
        norm_eps: added to the variance in every norm.

        Rarely needed:

        time_embedding_type: "positional" or "fourier" (see above).
        flip_sin_to_cos: whether the positional embedding begins with the cosines.
        freq_shift: of the positional embedding's exponent, 1 in DDPM, 0 elsewhere.
        downsample_padding: 1, or 0 for DDPM's padding on the right and below.
        downsample_type: "conv" or "resnet", in blocks with attention.
        upsample_type: likewise on the way up.
        mid_block_scale_factor: what sums in the middle are divided by.
        add_attention: whether there is attention in the middle.
        attn_norm_num_groups: its groups, where they differ.
        resnet_time_scale_shift: "default" adds the noise level, "scale_shift" lets it scale and shift the second norm.
        act_fn: the activation in the residual blocks; elsewhere it is SiLU.
        dropout: in the residual blocks.
        num_class_embeds: the number of classes, for a class-conditional network; the condition is then int64 (N,).
        center_input_sample: whether the input is an image in [0, 1], which the network maps to [-1, 1].
        patch: the side of the patches that the network works on, 1 for single pixels.
        pixel_channels: width of the blocks at full resolution, with patches; a multiple of 4, or 0 for none.

    Raises:
        ValueError: for a kind of block or an option that is not supported, or lists of different lengths.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block: int = 2,
        attention_head_dim: int | None = 8,
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        time_embedding_type: Literal["positional", "fourier"] = "positional",
        flip_sin_to_cos: bool = True,
        freq_shift: float = 0,
        downsample_padding: int = 1,
        downsample_type: Literal["conv", "resnet"] = "conv",
        upsample_type: Literal["conv", "resnet"] = "conv",
        mid_block_scale_factor: float = 1,
        add_attention: bool = True,
        attn_norm_num_groups: int | None = None,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        act_fn: str = "silu",
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        center_input_sample: bool = False,
        patch: int = 1,
        pixel_channels: int = 0,
    ) -> None:
        super().__init__()
        widths = list(block_out_channels)
        if not len(widths) == len(down_block_types) == len(up_block_types) > 0:
            raise ValueError(
                f"block_out_channels, down_block_types and up_block_types must have one entry per scale, got "
                f"{len(widths)}, {len(down_block_types)} and {len(up_block_types)}."
            )
        _known("down block", down_block_types, DOWN_BLOCKS)
        _known("up block", up_block_types, UP_BLOCKS)
        _known("time_embedding_type", [time_embedding_type], ("positional", "fourier"))
        _known("resnet_time_scale_shift", [resnet_time_scale_shift], ("default", "scale_shift"))
        _known("downsample_type", [downsample_type], ("conv", "resnet"))
        _known("upsample_type", [upsample_type], ("conv", "resnet"))
        _known("act_fn", [act_fn], _ACTIVATIONS)
        kinds = [DOWN_BLOCKS[name] for name in down_block_types] + [UP_BLOCKS[name] for name in up_block_types]
        if patch > 1 and any(kind.skip for kind in kinds):
            raise ValueError("patch above 1 is not supported with the blocks named Skip, which resample the image.")
        if pixel_channels and (patch == 1 or pixel_channels % 4):
            raise ValueError(
                f"pixel_channels must be a multiple of 4, in a network with patch above 1, got {pixel_channels} with "
                f"patch {patch}."
            )
        self.in_channels, self.patch, self.center = in_channels, patch, center_input_sample
        self.out_channels, self.classes = out_channels, num_class_embeds
        self.divisor = patch * 2 ** (len(widths) - 1)
        self.activation = _ACTIVATIONS[act_fn]
        embedding = 4 * widths[0]
        layout = _Layout(
            _Style(embedding, norm_eps, dropout, self.activation, resnet_time_scale_shift == "scale_shift"),
            norm_num_groups,
            attention_head_dim,
            downsample_padding,
            (downsample_type == "resnet", upsample_type == "resnet"),
            (in_channels, out_channels),
        )

        self.pixel_in: nn.Module | None = None
        if pixel_channels:
            self.pixel_in = nn.Conv2d(in_channels, pixel_channels, 3, padding=1)
            self.pixel_block_in = ResidualBlock(
                pixel_channels, pixel_channels, layout.style, groups=_quarter_groups(pixel_channels)
            )
        self.conv_in = nn.Conv2d((pixel_channels or in_channels) * patch**2, widths[0], 3, padding=1)
        self.time_proj: nn.Module
        if time_embedding_type == "fourier":
            self.time_proj = _Fourier(widths[0])
        else:
            self.time_proj = _Positional(widths[0], cosines_first=flip_sin_to_cos, freq_shift=freq_shift)
        features = 2 * widths[0] if time_embedding_type == "fourier" else widths[0]
        self.time_embedding = _Embedding(features, embedding)
        self.class_embedding = None if num_class_embeds is None else nn.Embedding(num_class_embeds, embedding)

        self.down_blocks = nn.ModuleList()
        kept = [widths[0]]  # widths of the features that are kept for the way up
        inputs = widths[0]
        for i, (name, outputs) in enumerate(zip(down_block_types, widths, strict=True)):
            halve = i < len(widths) - 1
            self.down_blocks.append(
                _DownBlock(DOWN_BLOCKS[name], inputs, outputs, layers_per_block, layout, halve=halve)
            )
            kept += [outputs] * (layers_per_block + halve)
            inputs = outputs
        self.mid_block = _MidBlock(
            widths[-1],
            layout,
            scale=mid_block_scale_factor,
            attention=add_attention,
            attention_groups=attn_norm_num_groups,
        )
        self.up_blocks = nn.ModuleList()
        for i, (name, outputs) in enumerate(zip(up_block_types, reversed(widths), strict=True)):
            beside = [kept.pop() for _ in range(layers_per_block + 1)]
            double = i < len(widths) - 1
            self.up_blocks.append(_UpBlock(UP_BLOCKS[name], inputs, beside, outputs, layout, double=double))
            inputs = outputs
        self.conv_norm_out = GroupNorm(layout.groups_of(widths[0]), widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], (pixel_channels or out_channels) * patch**2, 3, padding=1)
        if pixel_channels:
            groups = _quarter_groups(2 * pixel_channels), _quarter_groups(pixel_channels)
            self.pixel_block_out = ResidualBlock(
                2 * pixel_channels, pixel_channels, layout.style, groups=groups[0], groups_out=groups[1]
            )
            self.pixel_norm_out = GroupNorm(groups[1], pixel_channels, norm_eps)
            self.pixel_out = nn.Conv2d(pixel_channels, out_channels, 3, padding=1)
        self.built = structure(self)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | None = None) -> Tensor:
        """The raw output, (N, out_channels, H, W).

        Args:
            x: (N, in_channels, H, W) less the channels of an image condition; height and width multiples of
                ``divisor``.
            c_noise: (N,), the time step or log sigma, fractional or not.
            condition: classes, int64 (N,), for a network with ``num_class_embeds``; or an image, float (N, K, H, W),
                which is concatenated with x.
        """
        self._check(x, condition)
        classes = None
        if condition is not None and condition.is_floating_point():
            x = torch.cat([x, condition.to(x.dtype)], dim=1)
        elif condition is not None:
            classes = condition
        x = 2 * x - 1 if self.center else x
        embedding = self.time_embedding(self.time_proj(c_noise).to(x.dtype))
        if self.class_embedding is not None and classes is not None:
            embedding = embedding + self.class_embedding(classes)
        embedding = self.activation(embedding)  # every residual block begins with this
        pixels: Tensor | None = None
        if self.pixel_in is not None:
            x = pixels = self.pixel_block_in(self.pixel_in(x), embedding)
        x = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        h, image = self.conv_in(x), x
        kept = [h]
        for block in self.down_blocks:
            h, outputs, image = block(h, embedding, image)
            kept += outputs
        h = self.mid_block(h, embedding)
        picture: Tensor | None = None
        for block in self.up_blocks:
            h, picture = block(h, kept, embedding, picture)
        h = self.conv_out(self.conv_norm_out(h, F.silu))
        h = h if picture is None else h + picture
        h = F.pixel_shuffle(h, self.patch) if self.patch > 1 else h
        if pixels is None:
            return h
        h = self.pixel_block_out(torch.cat([h, pixels], dim=1), embedding)
        return self.pixel_out(self.pixel_norm_out(h, F.silu))

    def _check(self, x: Tensor, condition: Tensor | None) -> None:
        image = condition if condition is not None and condition.is_floating_point() else None
        classes = condition if image is None else None
        if x.ndim != 4:
            raise ValueError(f"x must be images (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}.")
        beside = 0 if image is None or image.ndim != 4 else image.shape[1]
        if image is not None and self.in_channels == x.shape[1]:
            raise ValueError(
                f"this network takes no image as its condition: all of its {self.in_channels} input channels are x's. "
                "Build it with condition_channels=."
            )
        if x.shape[1] + beside != self.in_channels or (image is not None and not beside):
            given = "" if image is None else f" and a condition of shape {tuple(image.shape)}"
            raise ValueError(
                f"the network takes {self.in_channels} channels in all, those of x (N, C, H, W) and of an image "
                f"condition if it was built with one, got x of shape {tuple(x.shape)}{given}."
            )
        height, width = x.shape[2:]
        if height % self.divisor or width % self.divisor:
            raise ValueError(
                f"height and width must be multiples of {self.divisor}, got {height}x{width}. Crop or pad the images."
            )
        if image is not None and image.shape != (len(x), beside, height, width):
            raise ValueError(
                f"the condition must be an image with x's batch and size, of shape {(len(x), beside, height, width)}, "
                f"got {tuple(image.shape)}."
            )
        if (classes is None) != (self.class_embedding is None):
            raise ValueError(
                "this network takes classes as its condition: pass condition=, int64 (N,)."
                if classes is None
                else "this network takes no classes as its condition."
            )
        if classes is not None and classes.shape != x.shape[:1]:
            raise ValueError(f"the classes must have shape {(len(x),)} like the batch, got {tuple(classes.shape)}.")


def _known(what: str, names: Sequence[str], known: Any) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{what} {name!r} is not supported; known are {', '.join(map(repr, known))}.")


# -- The family -------------------------------------------------------------------------------------------------------

_SIZE = Field(int, low=1, high=65_536)


class _Settled(nn.Module):
    """Replaces a module that depends on the noise level alone, and returns the output of that module for one level."""

    value: Tensor

    def forward(self, *_: Tensor) -> Tensor:
        return self.value


class _UNetFamily(Family[UNet]):
    name = "unet"
    network = UNet
    preconditions = ("karras", "ddpm", "ddpm_v", "ddpm_x0", "ncsnpp", "ncsnv2", "ncsn")
    keys: ClassVar[Mapping[str, Field]] = {
        "in_channels": _SIZE,
        "out_channels": _SIZE,
        "block_out_channels": Field(list, required=True, low=1, high=16, each=_SIZE),
        "down_block_types": Field(list, low=1, high=16, each=Field(str, choices=tuple(DOWN_BLOCKS))),
        "up_block_types": Field(list, low=1, high=16, each=Field(str, choices=tuple(UP_BLOCKS))),
        "layers_per_block": Field(int, low=1, high=64),
        "attention_head_dim": Field(int, optional=True, low=1, high=65_536),
        "norm_num_groups": Field(int, optional=True, low=1, high=65_536),
        "norm_eps": Field(float, low=0, high=1),
        "time_embedding_type": Field(str, choices=("positional", "fourier")),
        "flip_sin_to_cos": Field(bool),
        "freq_shift": Field(float, low=-1000, high=1000),
        "downsample_padding": Field(int, low=0, high=1),
        "downsample_type": Field(str, choices=("conv", "resnet")),
        "upsample_type": Field(str, choices=("conv", "resnet")),
        "mid_block_scale_factor": Field(float, low=1e-3, high=1000),
        "add_attention": Field(bool),
        "attn_norm_num_groups": Field(int, optional=True, low=1, high=65_536),
        "resnet_time_scale_shift": Field(str, choices=("default", "scale_shift")),
        "act_fn": Field(str, choices=tuple(_ACTIVATIONS)),
        "dropout": Field(float, low=0, high=1),
        "num_class_embeds": Field(int, optional=True, low=1),
        "center_input_sample": Field(bool),
        "patch": Field(int, low=1, high=64),
        "pixel_channels": Field(int, low=0, high=65_536),
    }

    def build(self, architecture: Mapping[str, Any], *, levels: int, precondition: str) -> UNet:
        return UNet(**architecture)

    def condition(self, backbone: UNet, *, predicts_variance: bool) -> Condition:
        """An image in the input channels that are not x's; x has as many channels as the score."""
        channels = backbone.out_channels // 2 if predicts_variance else backbone.out_channels
        return Condition(max(0, backbone.in_channels - channels), backbone.classes)

    def diffusers_class(self, architecture: Mapping[str, Any], precondition: str) -> str | None:
        """UNet2DModel, if its embedding of the noise level and the meaning of its output are those of the row."""
        if architecture.get("patch", 1) > 1:
            return None
        fourier = architecture.get("time_embedding_type") == "fourier"
        rows = ("ncsnpp",) if fourier else ("ddpm", "ddpm_v", "ddpm_x0")
        return "UNet2DModel" if precondition in rows else None

    # Torch's group norm copies to contiguous memory and back for channels_last data on CUDA.
    channels_last_on_cuda = False

    def width(self, backbone: UNet) -> int:
        patches = math.ceil(backbone.conv_in.out_channels / backbone.patch**2)
        return patches if backbone.pixel_in is None else max(patches, backbone.pixel_out.in_channels)

    def image_convolutions(self, backbone: UNet) -> tuple[set[str], set[str]]:
        if backbone.pixel_in is not None:
            return {"pixel_in"}, {"pixel_out"}
        skips = [name for name, _ in backbone.named_modules() if name.endswith("skip_conv")]
        first = {"conv_in", *(name for name in skips if name.startswith("down_blocks"))}
        return first, {"conv_out", *(name for name in skips if name.startswith("up_blocks"))}

    def level_modules(self, backbone: UNet) -> set[str]:
        kinds = ("time_proj", "time_embedding", "class_embedding", "time_emb_proj")
        return {name for name, _ in backbone.named_modules() if set(kinds) & set(name.split("."))}

    def settle(self, copy: UNet) -> Callable[[Tensor], None]:
        """The embedding of the level is computed once, and without classes also its projection in each block."""
        features, embed = copy.time_proj, copy.time_embedding
        embedding = copy.time_proj = _Settled()
        copy._modules["time_embedding"] = nn.Identity()
        pairs = []
        if copy.class_embedding is None:
            for block in copy.modules():
                if isinstance(block, ResidualBlock):
                    settled = _Settled()
                    pairs.append((block.time_emb_proj, settled))
                    block._modules["time_emb_proj"] = settled

        def settle(c_noise: Tensor) -> None:
            embedding.value = embed(features(c_noise[None]))
            for projection, settled in pairs:
                settled.value = projection(copy.activation(embedding.value))

        return settle


UNET = _UNetFamily()
