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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from scorematch.core.conditions import Condition
from scorematch.nets.family import Family
from scorematch.nets.layers import GroupNorm

SQRT2 = math.sqrt(2)


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


def mean_down(x: Tensor) -> Tensor:
    """Downsamples by two: the mean of 2 x 2 pixels."""
    return F.avg_pool2d(x, 2)


def nearest_up(x: Tensor) -> Tensor:
    """Upsamples by two: repeats each pixel twice along both axes."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


# -- Blocks -----------------------------------------------------------------------------------------------------------


class Style(NamedTuple):
    """The settings that all residual blocks of one network share."""

    embedding: int  # the width of the embedding of the noise level
    eps: float
    dropout: float
    activation: Callable[[Tensor], Tensor]
    scale_shift: bool  # whether the noise level scales and shifts the output of the second norm, or is added before it


class ResidualBlock(nn.Module):
    """norm, activation, conv, noise level, norm, activation, conv, added to the input; optionally with resampling."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        style: Style,
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


# -- The network ------------------------------------------------------------------------------------------------------


class ImageNetwork(nn.Module):
    """The base class of the U-Nets, whose condition is an image, a class, or nothing.

    A subclass defines the modules below. A block on the way down is called as ``block(h, embedding, image)``, and
    returns its output, the features that are kept for the way up, and the image for the next block. A block on the way
    up is called as ``block(h, kept, embedding, picture)``. It removes features from ``kept``, and returns its output
    and the picture, which is the sum over the scales of an output pyramid, or None.

    Args:
        in_channels: the number of channels of the input, including those of a conditioning image.
        out_channels: the number of channels of the output.
        scales: the number of scales. Height and width must be multiples of ``patch * 2 ** (scales - 1)``, ``divisor``.
        patch: the side of the patches in pixels, 1 for no patches.
        classes: the number of classes, or None.
        null_class: whether there is one more class, with the index ``classes``, for samples without a class.
        center: whether to map the input from [0, 1] to [-1, 1].

    Raises:
        ValueError: if ``null_class`` is True without classes, or the network takes both an image and a class.
    """

    conv_in: nn.Conv2d
    down_blocks: nn.ModuleList
    mid_block: MiddleBlock
    up_blocks: nn.ModuleList
    conv_norm_out: GroupNorm
    conv_out: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        scales: int,
        patch: int,
        classes: int | None,
        null_class: bool,
        center: bool,
    ) -> None:
        super().__init__()
        if null_class and classes is None:
            raise ValueError("null_class=True needs classes: pass the number of classes, or leave out null_class.")
        if classes is not None and in_channels > out_channels:
            raise ValueError(
                f"in_channels must be at most out_channels, {out_channels}, for a network with classes, since a "
                f"network takes one condition, an image or a class, got {in_channels}."
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.patch, self.divisor = patch, patch * 2 ** (scales - 1)
        self.classes, self.null_class, self.center = classes, null_class, center

    def class_table(self, width: int) -> nn.Embedding | None:
        """The embedding of the classes, a row (width,) for each; None for a network without classes."""
        return None if self.classes is None else nn.Embedding(self.classes + self.null_class, width)

    def inputs(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checks the shapes, and concatenates x with a conditioning image.

        Returns:
            The input of the first convolution (N, in_channels, H, W), in [-1, 1] if ``center`` is True; and the
            classes, or None.

        Raises:
            ValueError: if a shape does not fit the network.
        """
        image = condition if condition is not None and condition.is_floating_point() else None
        classes = condition if image is None else None
        self._check(x, image, classes)
        x = x if image is None else torch.cat([x, image.to(x.dtype)], dim=1)
        return 2 * x - 1 if self.center else x, classes

    def down_and_up(self, x: Tensor, embedding: Tensor, *, add_picture: bool) -> Tensor:
        """The way down and the way up, from the first to the last convolution.

        Args:
            x: the input (N, C, H, W).
            embedding: the embedding of the noise level (N, E) or (1, E), after its activation.
            add_picture: whether the picture of the last block is added to the output.
        """
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
        h = h + picture if add_picture and picture is not None else h
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h

    def _check(self, x: Tensor, image: Tensor | None, classes: Tensor | None) -> None:
        if x.ndim != 4:
            raise ValueError(f"x must be images (N, {self.in_channels}, H, W), got shape {tuple(x.shape)}.")
        channels = 0 if image is None or image.ndim != 4 else image.shape[1]  # of a conditioning image
        if image is not None and self.in_channels == x.shape[1]:
            raise ValueError(
                f"this network takes no image as its condition, since x has all of its {self.in_channels} input "
                "channels. Build it with condition_channels=."
            )
        if x.shape[1] + channels != self.in_channels or (image is not None and not channels):
            given = "" if image is None else f" and a condition of shape {tuple(image.shape)}"
            raise ValueError(
                f"x (N, C, H, W) and the conditioning image, if the network takes one, must have {self.in_channels} "
                f"channels in all, got x of shape {tuple(x.shape)}{given}."
            )
        height, width = x.shape[2:]
        if height % self.divisor or width % self.divisor:
            raise ValueError(
                f"height and width must be multiples of {self.divisor}, got {height}x{width}. Crop or pad the images."
            )
        expected = (x.shape[0], channels, height, width)
        if image is not None and image.shape != expected:
            raise ValueError(
                f"the condition must be an image with x's batch and size, of shape {expected}, got "
                f"{tuple(image.shape)}."
            )
        if (classes is None) != (self.classes is None):
            raise ValueError(
                "this network takes classes as its condition: pass condition=, int64 (N,)."
                if classes is None
                else "this network takes no classes as its condition."
            )
        if classes is not None and classes.shape != x.shape[:1]:
            raise ValueError(f"the classes must have shape {(len(x),)} like the batch, got {tuple(classes.shape)}.")


def is_larger(key: str, small: Mapping[str, Any], large: Mapping[str, Any]) -> bool:
    """Whether both configurations have a number for the key, and the second one is larger."""
    return bool(small.get(key, math.inf) < large.get(key, 0))


Images = TypeVar("Images", bound=ImageNetwork)


class ImageFamily(Family[Images]):
    """The base class of the families of such networks."""

    # For channels_last data on CUDA, torch's group norm copies to the contiguous format and back.
    channels_last_on_cuda = False

    def condition(self, backbone: Images, *, predicts_variance: bool) -> Condition:
        """An image if there are more input channels than x has, which are as many as the score has; or a class."""
        channels = backbone.out_channels // 2 if predicts_variance else backbone.out_channels
        return Condition(max(0, backbone.in_channels - channels), backbone.classes, backbone.null_class)

    def level_modules(self, backbone: Images) -> set[str]:
        """The embeddings of the noise level and of the classes, and their projections in the residual blocks."""
        kinds = ("time_proj", "time_embedding", "class_embedding", "time_emb_proj")
        return {name for name, _ in backbone.named_modules() if set(kinds) & set(name.split("."))}

    def growth(self, small: Mapping[str, Any], large: Mapping[str, Any]) -> set[str]:
        """A network may take a conditioning image, or one with more channels."""
        return {"in_channels"} if is_larger("in_channels", small, large) else set()
