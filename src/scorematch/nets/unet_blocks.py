"""The blocks of the U-Net of DDPM and NCSN++ in diffusers, by their names there.

The blocks with Skip in their names are those of NCSN++ (``scorematch.nets.ncsnpp``) with the pyramids "skip".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.arguments import check_choice
from scorematch.core.json_files import native
from scorematch.nets.blocks import SQRT2, DownBlock, ResidualBlock, Style, UpBlock, fir_up, quarter_groups
from scorematch.nets.layers import GroupNorm
from scorematch.nets.ncsnpp import PyramidDownBlock, Pyramids
from scorematch.nets.space import Space, mean_down, nearest_up


class Kind(NamedTuple):
    """The properties of a kind of block."""

    attention: bool = False
    skip: bool = False  # of NCSN++: the image is resampled in addition to the features
    residual: bool = False  # features are resampled by a residual block instead of a convolution


DOWN_BLOCKS = {
    "DownBlock2D": Kind(),
    "AttnDownBlock2D": Kind(attention=True),
    "ResnetDownsampleBlock2D": Kind(residual=True),
    "SkipDownBlock2D": Kind(skip=True),
    "AttnSkipDownBlock2D": Kind(attention=True, skip=True),
}
UP_BLOCKS = {
    "UpBlock2D": Kind(),
    "AttnUpBlock2D": Kind(attention=True),
    "ResnetUpsampleBlock2D": Kind(residual=True),
    "SkipUpBlock2D": Kind(skip=True),
    "AttnSkipUpBlock2D": Kind(attention=True, skip=True),
}


def block_types(attention: Sequence[bool], *, residual: bool = False) -> dict[str, Any]:
    """The keys of a configuration with the types of DDPM's or ADM's blocks, for scales with and without attention.

    Args:
        attention: whether each scale has attention, from full resolution down.
        residual: whether a residual block resamples the features, as in ADM; otherwise a convolution does, as in DDPM.
    """
    plain = "ResnetDownsampleBlock2D" if residual else "DownBlock2D"
    down = ["AttnDownBlock2D" if here else plain for here in attention]
    types = {"down_block_types": down, "up_block_types": [name.replace("Down", "Up") for name in reversed(down)]}
    return {**types, "downsample_type": "resnet", "upsample_type": "resnet"} if residual else types


class Layout(NamedTuple):
    """The settings that all blocks of one network share."""

    style: Style
    padding: int  # of strided convolutions
    residual_resampling: tuple[bool, bool]  # whether blocks with attention resample by a residual block: down, up
    channels: tuple[int, int]  # of the network's input and output

    @property
    def skip_style(self) -> Style:
        """The settings of the blocks with Skip in their names."""
        return self.style._replace(groups=None, scale=SQRT2)


def down_block(
    kind: Kind, inputs: int, outputs: int, layers: int, layout: Layout, *, head_width: int, halve: bool
) -> DownBlock:
    """A block on the way down, which halves height and width if ``halve`` is True."""
    style = layout.skip_style if kind.skip else layout.style
    groups = 32 if kind.skip else style.groups_of(outputs)
    attention = partial(style.attention, outputs, head_width, groups) if kind.attention else None
    if kind.skip:
        image = layout.channels[0]
        return PyramidDownBlock(inputs, outputs, layers, Pyramids(style), attention, halve=halve, image=image)
    block = DownBlock(inputs, outputs, layers, style, attention)
    if halve:
        # Built even if it is replaced: it draws random numbers, and a seed gives the same network as before.
        down: nn.Module = _Downsample(outputs, layout.padding, style.space)
        if kind.residual or (kind.attention and layout.residual_resampling[0]):
            down = ResidualBlock(outputs, outputs, style, resample=mean_down)
        block.downsamplers = nn.ModuleList([down])
    return block


def up_block(
    kind: Kind, inputs: int, kept: Sequence[int], outputs: int, layout: Layout, *, head_width: int, double: bool
) -> UpBlock:
    """A block on the way up, which doubles height and width if ``double`` is True.

    Args:
        kind: the kind of block.
        inputs: the width of the features of the block before.
        kept: the widths of the features of the way down, in the order in which they are concatenated.
        outputs: the width of the output.
        layout: the settings of the network.
        head_width: the width of an attention head.
        double: whether the block upsamples.
    """
    style = layout.skip_style if kind.skip else layout.style
    resnets = []
    for i, skip in enumerate(kept):
        below = outputs if i else inputs
        # In blocks with Skip and attention only the second term is divided by four, as the trained networks require.
        groups = min(below + skip // 4, 32) if kind.skip and kind.attention else None
        resnets.append(ResidualBlock(below + skip, outputs, style, groups=groups))
    count, groups = (1, 32) if kind.skip else (len(kept), style.groups_of(outputs))
    attentions = [style.attention(outputs, head_width, groups) for _ in range(count if kind.attention else 0)]
    block = UpBlock(resnets, attentions)
    if kind.skip:
        block.picture_up = fir_up
    if double and kind.skip:
        block.resnet_up = ResidualBlock(outputs, outputs, style, resample=fir_up, shortcut=True)
        block.skip_norm = GroupNorm(quarter_groups(outputs), outputs, style.eps)
        block.skip_conv = nn.Conv2d(outputs, layout.channels[1], 3, padding=1)
    elif double:
        up: nn.Module = _Upsample(outputs, style.space)  # as above
        if kind.residual or (kind.attention and layout.residual_resampling[1]):
            up = ResidualBlock(outputs, outputs, style, resample=nearest_up)
        block.upsamplers = nn.ModuleList([up])
    return block


class _Downsample(nn.Module):
    """A convolution of stride two. With ``padding`` = 0 it pads on the right and at the bottom only, as in DDPM."""

    def __init__(self, channels: int, padding: int, space: Space) -> None:
        super().__init__()
        self.conv = space.conv(channels, channels, stride=2, padding=padding)
        self.uneven = padding == 0

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1) * (x.ndim - 2)) if self.uneven else x)


class _Upsample(nn.Module):
    """Repeats each pixel twice in each direction, then applies a convolution."""

    def __init__(self, channels: int, space: Space) -> None:
        super().__init__()
        self.conv = space.conv(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(nearest_up(x))


# -- Checks -----------------------------------------------------------------------------------------------------------


def layers_of(layers: int | Sequence[int], widths: Sequence[int]) -> list[int]:
    """The number of residual blocks at each scale, from one number for all scales or one per scale."""
    layers = native(layers)  # integers of NumPy too
    if isinstance(layers, int):
        return [layers] * len(widths)
    if len(layers) != len(widths):
        raise ValueError(
            f"layers_per_block must be an integer or have one entry per scale, {len(widths)}, got {len(layers)}."
        )
    return list(layers)


def check_blocks(
    widths: Sequence[int],
    down_block_types: Sequence[str],
    up_block_types: Sequence[str],
    patch: int,
    pixel_channels: int,
    pixel_layers: int,
    space: Space,
) -> None:
    """Raises ValueError if there is not one block of a known type per scale, or patches do not fit the blocks."""
    if not len(widths) == len(down_block_types) == len(up_block_types) > 0:
        raise ValueError(
            f"block_out_channels, down_block_types and up_block_types must have one entry per scale, got "
            f"{len(widths)}, {len(down_block_types)} and {len(up_block_types)}."
        )
    for down, up in zip(down_block_types, up_block_types, strict=True):
        check_choice("down block", down, DOWN_BLOCKS)
        check_choice("up block", up, UP_BLOCKS)
    kinds = [DOWN_BLOCKS[name] for name in down_block_types] + [UP_BLOCKS[name] for name in up_block_types]
    if patch > 1 and any(kind.skip for kind in kinds):
        raise ValueError(f"patch must be 1 for blocks with Skip in their names, got {patch}.")
    if space != Space() and any(kind.skip for kind in kinds):
        raise ValueError(f"blocks with Skip in their names are for images with zeros around them, got {space}.")
    if pixel_channels and (patch == 1 or pixel_channels % (4 if pixel_channels <= 64 else 32)):
        raise ValueError(
            "pixel_channels must be a multiple of 4 up to 64, a multiple of 32 above, and 0 for patch=1, got "
            f"{pixel_channels} with patch={patch}."
        )
    if pixel_layers > 1 and not pixel_channels:
        raise ValueError(f"pixel_layers must be 1 without pixel_channels, got {pixel_layers}. Pass pixel_channels.")


def head_widths_of(key: str, heads: Sequence[int] | None, widths: Sequence[int], head_width: int | None) -> list[int]:
    """The width of an attention head at each scale, from the numbers of heads or from one width for all scales."""
    if heads is None:
        return [width if head_width is None else head_width for width in widths]
    if len(heads) != len(widths) or any(width % count for width, count in zip(widths, heads, strict=True)):
        raise ValueError(
            f"{key} must have one entry per scale that divides the width of the scale, {widths}, got {list(heads)}."
        )
    return [width // count for width, count in zip(widths, heads, strict=True)]
