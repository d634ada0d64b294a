r"""The U-Net of DDPM and of NCSN++, with the names and options of diffusers.

The encoder ("the way down") halves the resolution from scale to scale, and the decoder ("the way up") doubles it again.
Each scale has residual blocks with group norm, and some scales have attention. The features of the way down are
concatenated with those of the way up. Every residual block receives an embedding of the noise level, which is computed
from

- sines and cosines of c_noise at geometric frequencies ("positional", DDPM: c_noise is the time step), or
- sines and cosines of :math:`2 \pi w c_{noise}` with random w ("fourier", NCSN++: c_noise is log sigma).

The blocks with Skip in their names are those of NCSN++ in diffusers: on the way down, downsampled versions of the image
are added to the features at each scale; on the way up, the output is a sum of images over the scales. These blocks
resample with the filter (1, 3, 3, 1) and divide sums by :math:`\sqrt 2`. ``scorematch.nets.ncsnpp`` has the NCSN++ of
the authors' code, with all of its options.

With ``patch`` = p, the pixels of each patch of p x p pixels are moved to channels (space to depth) before the first
convolution, and back after the last. With p = 2 the network takes about a quarter of the time. It then has no layer at
full resolution, which may cause a grain with the period of the patches. ``pixel_channels`` therefore adds residual
blocks at full resolution, ``pixel_layers`` before the first step and as many after the last. A network whose first
width is less than the number of values of a patch, such as 32 for 4 x 4 x 4 of a volume, cannot denoise the small
scales without them. Patches are an addition of this package, and diffusers cannot run such a network. So are networks
of signals (N, C, L) and volumes (N, C, D, H, W), and of periodic fields (``scorematch.nets.space``).

Submodules and the keys of the configuration have the names of diffusers, since they are the format of the weights on
the Hugging Face Hub. Some choices, such as the number of groups in a block, are determined by the published weights.

References:
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    Song et al., 2021, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456.
    Nichol & Dhariwal, 2021, Improved Denoising Diffusion Probabilistic Models, arXiv:2102.09672.
    Dhariwal & Nichol, 2021, Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.arguments import check_choice
from scorematch.core.conditions import Parts
from scorematch.core.json_files import native
from scorematch.core.schema import Field
from scorematch.nets.blocks import (
    Attention,
    DownBlock,
    Embedding,
    Fourier,
    MiddleBlock,
    Positional,
    ResidualBlock,
    Style,
    UpBlock,
    VectorEmbedding,
)
from scorematch.nets.family import place, structure
from scorematch.nets.image_network import ImageFamily, ImageNetwork, cropped, is_larger
from scorematch.nets.layers import GroupNorm
from scorematch.nets.precondition import ROWS
from scorematch.nets.space import PADDINGS, Space
from scorematch.nets.unet_blocks import (
    DOWN_BLOCKS,
    UP_BLOCKS,
    Layout,
    block_types,
    check_blocks,
    down_block,
    head_widths_of,
    layers_of,
    up_block,
)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "relu": F.relu,
}


class UNet(ImageNetwork):
    """The U-Net of DDPM and NCSN++. The arguments are the keys of a configuration on the Hub, with their defaults.

    Args:
        in_channels: the number of channels of the input, including those of a conditioning image.
        out_channels: the number of channels of the output.
        block_out_channels: the number of feature channels (the width) at each scale, from full resolution down.
        down_block_types: the type of the block at each scale on the way down, from full resolution down; a key of
            ``DOWN_BLOCKS``.
        up_block_types: the type of the block at each scale on the way up, from the lowest resolution up; a key of
            ``UP_BLOCKS``.
        layers_per_block: the number of residual blocks at each scale on the way down, or a list with one number per
            scale from full resolution down (not in diffusers); the way up has one more.
        attention_head_dim: the width of an attention head; None is a single head. ``attention_heads`` overrides it.
        norm_num_groups: the number of groups of the group norms; None is a quarter of the channels, but at most 32.
        norm_eps: the eps that is added to the variance in every norm.

        Rarely needed:

        time_embedding_type: "positional" or "fourier" (see the module docstring).
        flip_sin_to_cos: whether the cosines come before the sines in the positional embedding.
        freq_shift: the shift in the exponent of the positional embedding, 1 in DDPM, 0 elsewhere.
        downsample_padding: the padding of strided convolutions: 1, or 0 to pad on the right and at the bottom only, as
            in DDPM.
        downsample_type: how blocks with attention downsample: "conv" or "resnet".
        upsample_type: how blocks with attention upsample: "conv" or "resnet".
        mid_block_scale_factor: the divisor of the sums in the middle block.
        add_attention: whether the middle block has attention.
        attn_norm_num_groups: the number of groups of the norm in the middle attention; None is that of the residual
            blocks, or no norm if ``resnet_time_scale_shift`` is "scale_shift".
        resnet_time_scale_shift: how the noise level enters a residual block: "default" adds it to the features,
            "scale_shift" scales and shifts the result of the second norm.
        act_fn: the activation in the residual blocks; elsewhere it is SiLU.
        dropout: the dropout probability in the residual blocks.
        num_class_embeds: the number of classes of a class-conditional network, whose condition is int64 (N,).
        class_embed_type: None for classes; "timestep" for a network whose condition is a number for each image, float
            (N, 1), embedded like a time step; "identity" for one whose condition is the embedding itself, float (N, K)
            with K = ``time_embedding_dim``.
        mid_block_type: None for a network without a middle block.
        center_input_sample: whether to map the input from [0, 1] to [-1, 1].
        time_embedding_dim: the width of the embedding of the noise level; None is four times the first width.

        Not in diffusers:

        time_proj_dim: the number of sines and cosines of the noise level, even for "fourier"; None is the first width,
            or twice the first width for "fourier".
        time_factor: the factor of c_noise in the positional embedding; 1000 / T for a network that was trained with T
            time steps rescaled to 1000.
        attention_heads: the number of attention heads at each scale, from full resolution down. The middle block has as
            many as the last scale.
        attention_heads_up: the number of attention heads on the way up, also from full resolution down; None is
            ``attention_heads``.
        null_class: whether there is one more class, for samples without a class.
        patch: the side of the patches in pixels, 1 for no patches.
        pixel_channels: the width of the blocks at full resolution, if ``patch`` is above 1; a multiple of 4, or 0 for
            none.
        pixel_layers: the number of blocks at full resolution on the way down, and the number on the way up.
        condition_features: K, the number of values of a vector as the condition, float (N, K); 0 for none.
        condition_encoder: a module that computes the vector from a condition (N, ...) of any shape; None for none.
        dimensions: the number of axes of the data: 1 for signals, 2 for images, 3 for volumes. The names of the blocks
            remain those of diffusers, with 2D.
        padding: what lies beyond the ends of the axes, "zeros", "circular" or "reflect", or a list with one of these
            for each axis.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        block_out_channels: Sequence[int] = (224, 448, 672, 896),
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: Sequence[str] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block: int | Sequence[int] = 2,
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
        class_embed_type: Literal["timestep", "identity"] | None = None,
        mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D",
        center_input_sample: bool = False,
        time_embedding_dim: int | None = None,
        time_proj_dim: int | None = None,
        time_factor: float = 1.0,
        attention_heads: Sequence[int] | None = None,
        attention_heads_up: Sequence[int] | None = None,
        null_class: bool = False,
        patch: int = 1,
        pixel_channels: int = 0,
        pixel_layers: int = 1,
        condition_features: int = 0,
        condition_encoder: nn.Module | None = None,
        dimensions: int = 2,
        padding: str | Sequence[str] = "zeros",
    ) -> None:
        space = Space.of(dimensions, padding)
        widths = list(block_out_channels)
        embedding = 4 * widths[0] if time_embedding_dim is None else time_embedding_dim
        super().__init__(
            in_channels,
            out_channels,
            scales=len(widths),
            patch=patch,
            classes=num_class_embeds if class_embed_type is None else None,
            null_class=null_class,
            center=center_input_sample,
            encoder=condition_encoder is not None,
            vector=condition_features or {None: 0, "timestep": 1, "identity": embedding}[class_embed_type],
            space=space,
        )
        check_blocks(widths, down_block_types, up_block_types, patch, pixel_channels, pixel_layers, space)
        check_choice("time_embedding_type", time_embedding_type, ("positional", "fourier"))
        check_choice("resnet_time_scale_shift", resnet_time_scale_shift, ("default", "scale_shift"))
        check_choice("downsample_type", downsample_type, ("conv", "resnet"))
        check_choice("upsample_type", upsample_type, ("conv", "resnet"))
        check_choice("act_fn", act_fn, _ACTIVATIONS)
        layers = layers_of(layers_per_block, widths)
        self.activation = _ACTIVATIONS[act_fn]
        head_widths = head_widths_of("attention_heads", attention_heads, widths, attention_head_dim)
        head_widths_up = head_widths
        if attention_heads_up is not None:
            head_widths_up = head_widths_of("attention_heads_up", attention_heads_up, widths, None)
        scale_shift = resnet_time_scale_shift == "scale_shift"
        style = Style(embedding, norm_eps, dropout, self.activation, scale_shift, norm_num_groups, space=space)
        resampling = downsample_type == "resnet", upsample_type == "resnet"
        layout = Layout(style, downsample_padding, resampling, (in_channels, out_channels))

        self.pixel_in: nn.Module | None = None
        pixel_style = style._replace(groups=None)
        if pixel_channels:
            self.pixel_in = space.conv(in_channels, pixel_channels)
            self.pixel_block_in = ResidualBlock(pixel_channels, pixel_channels, pixel_style)
            self.pixel_blocks_in = _pixel_blocks(pixel_channels, pixel_layers - 1, pixel_style)
        values = patch**dimensions
        self.conv_in = space.conv((pixel_channels or in_channels) * values, widths[0])
        fourier = time_embedding_type == "fourier"
        features = widths[0] * (2 if fourier else 1) if time_proj_dim is None else time_proj_dim
        if fourier:
            self.time_proj = Fourier(features)
        else:
            self.time_proj = Positional(
                features, cosines_first=flip_sin_to_cos, freq_shift=freq_shift, factor=time_factor
            )
        self.time_embedding = Embedding(features, embedding)
        self.class_embedding: nn.Module | None = self.class_table(embedding)
        self.vector_embedding: nn.Module | None = None  # beside that of the class; alone it is ``class_embedding``
        self.log_numbers = fourier  # as diffusers embeds them
        if class_embed_type is not None:
            timestep = class_embed_type == "timestep"
            self.class_embedding = Embedding(features, embedding) if timestep else nn.Identity()
        if condition_features:
            if class_embed_type is not None:
                raise ValueError(
                    "class_embed_type and condition_features cannot both be given: a network takes one vector."
                )
            vectors = VectorEmbedding(condition_features, embedding, condition_encoder)
            if self.class_embedding is None:
                self.class_embedding = vectors
            else:
                self.vector_embedding = vectors

        def down(scale: int, inputs: int, halve: bool) -> DownBlock:
            kind, head_width = DOWN_BLOCKS[down_block_types[scale]], head_widths[scale]
            outputs, count = widths[scale], layers[scale]
            return down_block(kind, inputs, outputs, count, layout, head_width=head_width, halve=halve)

        def middle() -> MiddleBlock | None:
            if mid_block_type is None:
                return None
            lowest, shared = widths[-1], style._replace(scale=mid_block_scale_factor)
            groups = attn_norm_num_groups
            if groups is None and not scale_shift:
                groups = style.groups_of(lowest)
            resnets = [ResidualBlock(lowest, lowest, shared) for _ in range(2)]
            return MiddleBlock(resnets, shared.attention(lowest, head_widths[-1], groups) if add_attention else None)

        def up(scale: int, inputs: int, kept: list[int]) -> UpBlock:
            kind, head_width = UP_BLOCKS[up_block_types[-1 - scale]], head_widths_up[scale]
            return up_block(kind, inputs, kept, widths[scale], layout, head_width=head_width, double=scale > 0)

        self.add_blocks(widths[0], widths, layers, down=down, middle=middle, up=up)
        self.conv_norm_out = GroupNorm(style.groups_of(widths[0]), widths[0], norm_eps)
        self.conv_out = space.conv(widths[0], (pixel_channels or out_channels) * values)
        if pixel_channels:
            self.pixel_block_out = ResidualBlock(2 * pixel_channels, pixel_channels, pixel_style)
            self.pixel_blocks_out = _pixel_blocks(pixel_channels, pixel_layers - 1, pixel_style)
            self.pixel_norm_out = GroupNorm(pixel_style.groups_of(pixel_channels), pixel_channels, norm_eps)
            self.pixel_out = space.conv(pixel_channels, out_channels)
        self.built = structure(self)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | Parts | None = None) -> Tensor:
        """The raw output of the network, (N, out_channels, ...), of the size of x.

        Args:
            x: (N, C, H, W), where C is ``in_channels`` minus the number of channels of a conditioning image; height and
                width are multiples of ``divisor``.
            c_noise: (N,), the time step or log sigma, possibly fractional.
            condition: classes, int64 (N,), for a network with ``num_class_embeds``; an image, float (N, K, H, W), which
                is concatenated with x; or a vector, float (N, K); or a dict of these, "class", "image" and "features".
        """
        sides = x.shape[2:]
        x, others = self.inputs(x, condition)
        embedding = self.time_embedding(self.time_proj(c_noise).to(x.dtype))
        for name, other in others.items():
            embed = self.vector_embedding if name == "features" else None
            embed = self.class_embedding if embed is None else embed
            if isinstance(embed, Embedding):  # a number for each image
                number = other[:, 0].to(c_noise.dtype)
                other = self.time_proj(number.log() if self.log_numbers else number)
            other = other.to(x.dtype) if other.is_floating_point() else other
            embedding = embedding if embed is None else embedding + embed(other)
        if self.augmentation is not None:
            embedding = self.augmentation(embedding)
        embedding = self.activation(embedding)  # once, instead of in every residual block
        pixels: Tensor | None = None
        if self.pixel_in is not None:
            x = self.pixel_block_in(self.pixel_in(x), embedding)
            for block in self.pixel_blocks_in:
                x = block(x, embedding)
            pixels = x
        h = self.down_and_up(x, embedding, add_picture=True)
        if pixels is None:
            return cropped(h, sides)
        h = self.pixel_block_out(torch.cat([h, pixels], dim=1), embedding)
        for block in self.pixel_blocks_out:
            h = block(h, embedding)
        return cropped(self.pixel_out(self.pixel_norm_out(h, F.silu)), sides)

    @torch.no_grad()
    def initialize(self) -> None:
        """Sets weights to zero as in DDPM, so that each residual block starts as the identity, and the output as zero.

        All other weights keep their initial values.
        """
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.weight)
        for name in UNET.image_convolutions(self)[1]:
            for parameter in self.get_submodule(name).parameters():
                nn.init.zeros_(parameter)


def _pixel_blocks(width: int, count: int, style: Style) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(width, width, style) for _ in range(count))


# -- The family -------------------------------------------------------------------------------------------------------

_SIZE = Field(int, low=1, high=65_536)
_HEADS = Field(list, optional=True, low=1, high=16, each=_SIZE)
# The keys that diffusers does not have, with the values for which the network is the same as in diffusers.
OWN_KEYS: Mapping[str, Any] = {
    "time_proj_dim": None,
    "time_factor": 1,
    "attention_heads": None,
    "attention_heads_up": None,
    "null_class": False,
    "patch": 1,
    "pixel_channels": 0,
    "pixel_layers": 1,
    "condition_features": 0,
    "condition_encoder": False,
    "dimensions": 2,
    "padding": "zeros",
}


def _groups(widths: Sequence[int]) -> int:
    # A norm of single channels would remove the embedding, which is added to each channel, and with it the noise level.
    groups = math.gcd(32, *widths)
    return groups if min(widths) >= 2 * groups else max(1, groups // 2)


class _UNetFamily(ImageFamily[UNet]):
    name = "unet"
    network = UNet
    levels = (50, 0.01, 232)
    dimensions = (1, 2, 3)
    class_before_embedding = False
    preconditions = (
        "karras",
        "ddpm",
        "ddpm_v",
        "ddpm_x0",
        "vp",
        "subvp",
        "ncsnpp",
        "ncsnpp_index",
        "ncsnv2",
        "ncsn",
        "flow",
        "flow_reverse",
    )
    keys: ClassVar[Mapping[str, Field]] = {
        "in_channels": _SIZE,
        "out_channels": _SIZE,
        "block_out_channels": Field(list, required=True, low=1, high=16, each=_SIZE),
        "down_block_types": Field(list, low=1, high=16, each=Field(str, choices=tuple(DOWN_BLOCKS))),
        "up_block_types": Field(list, low=1, high=16, each=Field(str, choices=tuple(UP_BLOCKS))),
        "layers_per_block": Field(int, low=1, high=64, or_list=16),
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
        "num_class_embeds": Field(int, optional=True, low=1, high=10_000_000),
        "class_embed_type": Field(str, optional=True, choices=("timestep", "identity")),
        "mid_block_type": Field(str, optional=True, choices=("UNetMidBlock2D",)),
        "center_input_sample": Field(bool),
        "time_embedding_dim": Field(int, optional=True, low=1, high=65_536),
        "time_proj_dim": Field(int, optional=True, low=2, high=65_536),
        "time_factor": Field(float, low=1e-6, high=1e6),
        "attention_heads": _HEADS,
        "attention_heads_up": _HEADS,
        "null_class": Field(bool),
        "patch": Field(int, low=1, high=64),
        "pixel_channels": Field(int, low=0, high=65_536),
        "pixel_layers": Field(int, low=1, high=64),
        "condition_features": Field(int, low=0, high=1_000_000),
        "condition_encoder": Field(bool),
        "dimensions": Field(int, low=1, high=3),
        "padding": Field(str, choices=PADDINGS, or_list=3),
    }

    def design(self, given: Mapping[str, Any], size: tuple[int, ...], precondition: str) -> dict[str, Any]:
        architecture = super().design(given, size, precondition)
        widths = architecture["block_out_channels"]
        attention = given["attention"]
        attention = [False] * (len(widths) - 1) + [True] if attention is None else attention
        if len(attention) != len(widths):
            raise ValueError(f"attention must have one entry per scale, {len(widths)}, got {len(attention)}.")
        layers = native(given["layers_per_block"])
        if isinstance(layers, list) and layers == layers[:1] * len(widths):
            layers = layers[0]  # as in diffusers
        architecture |= {
            **block_types(attention),
            "layers_per_block": layers,
            "attention_head_dim": None,
            "norm_num_groups": _groups(widths),
            "dropout": given["dropout"],
            "num_class_embeds": given["classes"],
        }
        if given["patch"] != 1 or given["pixel_channels"]:
            architecture |= {"patch": given["patch"], "pixel_channels": given["pixel_channels"]}
        if given["pixel_layers"] != 1:
            architecture["pixel_layers"] = given["pixel_layers"]
        if given["null_class"]:
            architecture["null_class"] = True
        if len(size) != 2:
            architecture["dimensions"] = len(size)
        if given["condition_features"]:
            architecture["condition_features"] = given["condition_features"]
        if given["condition_encoder"] is not None:
            architecture["condition_encoder"] = True
        if given["padding"] != "zeros":
            architecture["padding"] = native(given["padding"])
        return architecture

    def diffusers_class(self, architecture: Mapping[str, Any], precondition: str) -> str | None:
        """UNet2DModel, if it supports the options, and c_noise and the meaning of the output fit the row."""
        if any(architecture.get(key, value) != value for key, value in OWN_KEYS.items()):
            return None
        if not isinstance(architecture.get("layers_per_block", 2), int):
            return None
        blocks = [*architecture.get("down_block_types", ()), *architecture.get("up_block_types", ())]
        if architecture.get("norm_num_groups", 32) is None and not all("Skip" in name for name in blocks):
            return None
        embedding = architecture.get("time_embedding_type", "positional")
        return "UNet2DModel" if ROWS[precondition].diffusers == embedding else None

    def width(self, backbone: UNet) -> int:
        patches = math.ceil(backbone.conv_in.out_channels / backbone.patch**backbone.space.dimensions)
        return patches if backbone.pixel_in is None else max(patches, backbone.pixel_out.in_channels)

    def image_convolutions(self, backbone: UNet) -> tuple[set[str], set[str]]:
        if backbone.pixel_in is not None:
            return {"pixel_in"}, {"pixel_out"}
        down, up = self.skip_convolutions(backbone)
        return {"conv_in", *down}, {"conv_out", *up}

    def growth(self, small: Mapping[str, Any], large: Mapping[str, Any]) -> set[str]:
        """More layers, attention at more scales, and more channels and layers at full resolution are possible too."""
        keys = super().growth(small, large)
        blocks = ("down_block_types", "up_block_types")
        kinds = [kind for key in blocks for kind in large.get(key, ())]
        resampling = (large.get("downsample_type"), large.get("upsample_type"))
        if any("Skip" in kind for kind in kinds) or "resnet" in resampling:
            return keys  # additional layers of these networks cannot be the identity
        before, now = (
            layers_of(each.get("layers_per_block", 2), each["block_out_channels"]) for each in (small, large)
        )
        if before != now and len(before) == len(now) and all(new >= old for old, new in zip(before, now, strict=True)):
            keys.add("layers_per_block")
        for key in blocks:
            pairs = zip(small.get(key, ()), large.get(key, ()), strict=False)
            if all(new in (old, f"Attn{old}") for old, new in pairs):
                keys.add(key)
        if small.get("pixel_channels", 0) > 0 and small.get("pixel_layers", 1) < large.get("pixel_layers", 1):
            keys.add("pixel_layers")
        # Up to 64 channels, all groups of the norms at full resolution have four channels.
        if is_larger("pixel_channels", small, large) and small["pixel_channels"] > 0 and large["pixel_channels"] <= 64:
            keys.add("pixel_channels")
        return keys

    def larger(self, architecture: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        keys = {"layers_per_block", "pixel_channels", "pixel_layers"}
        unknown = sorted(changes.keys() - keys - {"attention"})
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} cannot become larger within a run: a U-Net can grow in attention, "
                f"{', '.join(sorted(keys))}."
            )
        larger = {key: changes[key] for key in sorted(keys & changes.keys())}
        for key, value in larger.items():
            if not self.keys[key].fits(native(value)):
                raise ValueError(f"{key} must be {self.keys[key]}, got {value!r}.")
        if "attention" not in changes:
            return larger
        attention, scales = native(changes["attention"]), len(architecture["block_out_channels"])
        if not isinstance(attention, list) or len(attention) != scales:
            raise ValueError(f"attention must have one entry per scale, {scales}, got {changes['attention']!r}.")
        return {**larger, **block_types(attention)}

    def grow(self, small: UNet, large: UNet) -> dict[str, Tensor]:
        """Additional residual blocks and attention are the identity at first (Chen et al., 2016, arXiv:1511.05641).

        On the way up they lie between the first and the second block of a scale, so that each of the other blocks takes
        the features of the same block on the way down as before.
        """
        grown = {name: weight.clone() for name, weight in large.state_dict().items()}
        for name, module in large.named_modules():
            if isinstance(module, ResidualBlock | Attention):
                output = f"{name}.conv2" if isinstance(module, ResidualBlock) else f"{name}.to_out.0"
                nn.init.zeros_(grown[f"{output}.weight"])
                nn.init.zeros_(grown[f"{output}.bias"])
            if isinstance(module, ResidualBlock) and module.conv_shortcut is not None:
                nn.init.dirac_(grown[f"{name}.conv_shortcut.weight"])
                nn.init.zeros_(grown[f"{name}.conv_shortcut.bias"])
        both: Tensor | None = None  # of pixel_block_out: the channels of the way up, then those of pixel_block_in
        if small.pixel_in is not None:
            channels = torch.arange(small.pixel_out.in_channels)
            both = torch.cat([channels, large.pixel_out.in_channels + channels])
        layers, now = ([len(cast(UpBlock, up).resnets) for up in net.up_blocks] for net in (small, large))
        more = [new - old for old, new in zip(layers, now, strict=True)]
        later = re.compile(r"^up_blocks\.(\d+)\.(resnets|attentions)\.([1-9]\d*)(?=\.)")
        for name, weight in small.state_dict().items():
            target = later.sub(lambda part: f"up_blocks.{part[1]}.{part[2]}.{int(part[3]) + more[int(part[1])]}", name)
            inputs = both if name in ("pixel_block_out.conv1.weight", "pixel_block_out.conv_shortcut.weight") else None
            outputs = both if name.startswith("pixel_block_out.norm1.") else None
            place(grown[target], weight, outputs=outputs, inputs=inputs)
        return grown


UNET = _UNetFamily()
