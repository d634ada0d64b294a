r"""NCSN++ and DDPM++, the networks of Song et al. (2021), which EDM uses too.

Like the U-Net of DDPM, they have residual blocks and attention on the way down to low resolution and on the way up. The
differences are:

- residual blocks resample the features, with the filter (1, 3, 3, 1) in NCSN++ or (1, 1) in DDPM++ (the mean of 2 x 2
  pixels, and repetition);
- the sums of residual blocks, of attention and of the "residual" pyramids below are divided by :math:`\sqrt 2`;
- the number of groups of a group norm is a quarter of the number of channels, but at most 32;
- on the way up there is one attention per scale, after the last residual block;
- the first convolution may have fewer output channels than the first scale;
- the embedding of the class is added to the sines and cosines of the noise level, before the linear layers.

In addition there may be an input and an output pyramid. The input pyramid is added to the features at each lower scale:
it is the downsampled image ("skip"), or a running sum of the image and the features ("residual"). The output pyramid is
a sum of outputs over the scales on the way up, of images ("skip") or of features ("residual").

==================================  ===========  ============  =============  ==============
published networks                  embedding    filter        input pyramid  output pyramid
==================================  ===========  ============  =============  ==============
NCSN++, 32 px; EDM's ncsnpp         fourier (1)  (1, 3, 3, 1)  residual       none
NCSN++, 256 and 1024 px             fourier      (1, 3, 3, 1)  skip           skip
DDPM++; EDM's ddpmpp                positional   (1, 1)        none           none
==================================  ===========  ============  =============  ==============

(1) "positional" in the network that receives the index of the noise level (the row "ncsnpp_index").

The authors number the modules of these networks, or name them after the resolution. Here they have the names of the
corresponding modules in diffusers, such as ``down_blocks.0.resnets.0.conv1``, which do not depend on the resolution.

References:
    Song et al., 2021, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456,
        App. H.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, App. F.
    Karras et al., 2020, Analyzing and Improving the Image Quality of StyleGAN, arXiv:1912.04958 (the pyramids).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.arguments import check_choice
from scorematch.core.conditions import Parts
from scorematch.core.schema import Field
from scorematch.nets.blocks import (
    SQRT2,
    Attention,
    DownBlock,
    Embedding,
    Filter,
    Fourier,
    MiddleBlock,
    Positional,
    ResidualBlock,
    Style,
    UpBlock,
    fir_up,
    quarter_groups,
)
from scorematch.nets.family import structure
from scorematch.nets.image_network import ImageFamily, ImageNetwork, cropped
from scorematch.nets.layers import GroupNorm
from scorematch.nets.precondition import ROWS
from scorematch.nets.space import mean_down, nearest_up

Pyramid = Literal["none", "skip", "residual"]
TimeEmbedding = Literal["positional", "fourier"]

_TIME_EMBEDDINGS = get_args(TimeEmbedding)
_PYRAMIDS = get_args(Pyramid)
_FILTERS = ([1, 1], [1, 3, 3, 1])
_EPS = 1e-6


class Pyramids(NamedTuple):
    """The settings that the blocks of one network share: those of a residual block, the filter and the pyramids."""

    style: Style
    taps: tuple[int, ...] = (1, 3, 3, 1)  # the values of the filter
    inputs: Pyramid = "skip"
    outputs: Pyramid = "skip"
    filtered: bool = True  # whether a "residual" input pyramid is filtered

    @property
    def smooth(self) -> bool:
        """Whether the filter is (1, 3, 3, 1)."""
        return self.taps != (1, 1)

    def down(self) -> Callable[[Tensor], Tensor]:
        """A function that downsamples by two."""
        return Filter(self.taps) if self.smooth else mean_down

    def up(self) -> Callable[[Tensor], Tensor]:
        """A function that upsamples by two."""
        return fir_up if self.smooth else nearest_up


class PyramidDownBlock(DownBlock):
    """A block with an input pyramid, whose image has the number of channels ``image``."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        pyramids: Pyramids,
        attention: Callable[[], Attention] | None,
        *,
        halve: bool,
        image: int,
    ) -> None:
        style, taps = pyramids.style, pyramids.taps
        super().__init__(inputs, outputs, layers, style, attention)
        if not halve:
            return
        self.resnet_down = ResidualBlock(outputs, outputs, style, resample=pyramids.down(), shortcut=True)
        if pyramids.inputs == "skip":
            self.image_down = pyramids.down()
            self.skip_conv = nn.Conv2d(image, outputs, 1)
        elif pyramids.inputs == "residual":
            self.image_down = nn.ZeroPad2d((0, 1, 0, 1))
            if pyramids.filtered:  # padded for the filter and for the convolution of stride two
                self.image_down = Filter(taps, stride=1, padding=len(taps) // 2)
            self.skip_conv = nn.Conv2d(image, outputs, 3, stride=2)
            self.sum_divisor = style.scale


class _UpBlock(UpBlock):
    def __init__(
        self,
        inputs: int,
        kept: Sequence[int],
        outputs: int,
        pyramids: Pyramids,
        *,
        attention: bool,
        lowest: bool,
        double: bool,
        image: int,
    ) -> None:
        style = pyramids.style
        super().__init__(
            [ResidualBlock((outputs if i else inputs) + skip, outputs, style) for i, skip in enumerate(kept)],
            [_attention(outputs, style)] if attention else [],
        )
        pyramid, self.sum_divisor, self.picture_up = pyramids.outputs, style.scale, pyramids.up()
        if double and (pyramid == "skip" or (pyramid == "residual" and lowest)):
            self.skip_norm = GroupNorm(quarter_groups(outputs), outputs, _EPS)
            self.skip_conv = nn.Conv2d(outputs, image if pyramid == "skip" else outputs, 3, padding=1)
        elif pyramid == "residual" and not lowest:
            if pyramids.smooth:  # one more pixel on each side, so that the convolution needs no padding
                self.picture_up = partial(fir_up, margin=1)
            self.skip_conv = nn.Conv2d(inputs, outputs, 3, padding=0 if pyramids.smooth else 1)
        if double:
            self.resnet_up = ResidualBlock(outputs, outputs, style, resample=pyramids.up(), shortcut=True)


def _attention(channels: int, style: Style) -> Attention:
    return style.attention(channels, channels, style.groups_of(channels))


class NCSNPP(ImageNetwork):
    """NCSN++ and DDPM++. The arguments are the keys of a configuration.

    Args:
        in_channels: the number of channels of the input, including those of a conditioning image.
        out_channels: the number of channels of the output.
        block_out_channels: the number of feature channels at each scale, from full resolution down. Height and width
            are halved from one scale to the next.
        layers_per_block: the number of residual blocks at each scale on the way down; the way up has one more.
        attention: one bool per scale, True for attention at this scale; None gives it to no scale. The middle block
            always has attention.
        time_embedding_type: "fourier" or "positional": sines and cosines of c_noise at random or at geometric
            frequencies.
        resample_filter: the filter for resampling, (1, 3, 3, 1) or (1, 1).
        input_pyramid: the input pyramid, "residual", "skip" or "none" (see the module docstring).
        output_pyramid: the output pyramid, "residual", "skip" or "none".
        dropout: the dropout probability in the residual blocks.
        num_class_embeds: the number of classes of a class-conditional network, whose condition is int64 (N,).
        null_class: whether there is one more class, for samples without a class.
        center_input_sample: whether to map the input from [0, 1] to [-1, 1].

        Rarely needed:

        model_channels: the number of output channels of the first convolution; None is that of the first scale.
        time_proj_dim: the number of sines and cosines of the noise level, even for "fourier"; None is
            ``model_channels``, or twice that for "fourier".
        time_embedding_dim: the width of the embedding of the noise level; None is four times ``model_channels``.
        skip_rescale: whether sums are divided by the square root of two.
        pyramid_filter: whether the "residual" input pyramid is filtered before each of its convolutions of stride two.
            Networks of Song et al. with ``fir: false`` pad it on the right and below instead.
        patch: the side of the patches in pixels, 1 for no patches.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        block_out_channels: Sequence[int] = (128, 256, 256, 256),
        layers_per_block: int = 4,
        attention: Sequence[bool] | None = None,
        time_embedding_type: TimeEmbedding = "fourier",
        resample_filter: Sequence[int] = (1, 3, 3, 1),
        input_pyramid: Pyramid = "residual",
        output_pyramid: Pyramid = "none",
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        null_class: bool = False,
        center_input_sample: bool = False,
        model_channels: int | None = None,
        time_proj_dim: int | None = None,
        time_embedding_dim: int | None = None,
        skip_rescale: bool = True,
        pyramid_filter: bool = True,
        patch: int = 1,
    ) -> None:
        widths = list(block_out_channels)
        attention = [False] * len(widths) if attention is None else list(attention)
        super().__init__(
            in_channels,
            out_channels,
            scales=len(widths),
            patch=patch,
            classes=num_class_embeds,
            null_class=null_class,
            center=center_input_sample,
        )
        if not widths or len(attention) != len(widths):
            raise ValueError(
                "block_out_channels and attention must have one entry per scale, at least one, got "
                f"{len(widths)} and {len(attention)}."
            )
        check_choice("time_embedding_type", time_embedding_type, _TIME_EMBEDDINGS)
        check_choice("input_pyramid", input_pyramid, _PYRAMIDS)
        check_choice("output_pyramid", output_pyramid, _PYRAMIDS)
        check_choice("resample_filter", list(resample_filter), _FILTERS)
        self.input_pyramid, self.output_pyramid = input_pyramid, output_pyramid
        model_channels = widths[0] if model_channels is None else model_channels
        embedding = 4 * model_channels if time_embedding_dim is None else time_embedding_dim
        self.activation = F.silu
        style = Style(embedding, _EPS, dropout, self.activation, scale=SQRT2 if skip_rescale else 1.0)
        pyramids = Pyramids(style, tuple(resample_filter), input_pyramid, output_pyramid, pyramid_filter)

        fourier = time_embedding_type == "fourier"
        features = model_channels * (2 if fourier else 1) if time_proj_dim is None else time_proj_dim
        time_proj = Fourier(features) if fourier else Positional(features, cosines_first=False, freq_shift=1)
        self.class_embedding = self.class_table(features)
        self.time_embedding = Embedding(features, embedding)
        # Not the first module: the dtype of the first parameter is that in which the network computes.
        self.time_proj = time_proj

        image = in_channels * patch**2
        self.conv_in = nn.Conv2d(image, model_channels, 3, padding=1)

        def down(scale: int, inputs: int, halve: bool) -> DownBlock:
            attend = partial(_attention, widths[scale], style) if attention[scale] else None
            channels = inputs if input_pyramid == "residual" and scale else image  # of the input pyramid
            outputs = widths[scale]
            return PyramidDownBlock(inputs, outputs, layers_per_block, pyramids, attend, halve=halve, image=channels)

        def middle() -> MiddleBlock:
            resnets = [ResidualBlock(widths[-1], widths[-1], style) for _ in range(2)]
            return MiddleBlock(resnets, _attention(widths[-1], style))

        def up(scale: int, inputs: int, kept: list[int]) -> UpBlock:
            return _UpBlock(
                inputs,
                kept,
                widths[scale],
                pyramids,
                attention=attention[scale],
                lowest=scale == len(widths) - 1,
                double=scale > 0,
                image=out_channels * patch**2,
            )

        layers = [layers_per_block] * len(widths)
        self.add_blocks(model_channels, widths, layers, down=down, middle=middle, up=up)
        self.conv_norm_out = GroupNorm(quarter_groups(widths[0]), widths[0], _EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch**2, 3, padding=1)
        self.built = structure(self)

    def forward(self, x: Tensor, c_noise: Tensor, condition: Tensor | Parts | None = None) -> Tensor:
        """The raw output of the network, (N, out_channels, H, W).

        Args:
            x: (N, C, H, W), where C is ``in_channels`` minus the number of channels of a conditioning image.
            c_noise: (N,), the c_noise of the preconditioning, such as log sigma or the time step.
            condition: classes, int64 (N,), for a network with ``num_class_embeds``; or an image, float (N, K, H, W),
                which is concatenated with x; or a dict of both, "class" and "image".
        """
        sides = x.shape[2:]
        x, others = self.inputs(x, condition)
        embedding = self.time_proj(c_noise).to(x.dtype)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(others["class"])
        embedding = self.time_embedding(embedding)
        if self.augmentation is not None:
            embedding = self.augmentation(embedding)
        embedding = self.activation(embedding)  # once, instead of in every residual block
        return cropped(self.down_and_up(x, embedding, add_picture=self.output_pyramid == "skip"), sides)

    @torch.no_grad()
    def initialize(self) -> None:
        """Initializes the weights as in the authors' code.

        They are uniform, with a variance of 2 / (inputs + outputs), or a tenth of it for queries, keys and values. The
        last convolution of each block is zero, so that each block starts as the identity, up to the division of sums;
        and so is the last convolution of the network.
        """
        last = NCSNPP_FAMILY.image_convolutions(self)[1]
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                small = name.endswith((".to_q", ".to_k", ".to_v"))
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(0.1) if small else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, nn.Embedding):  # in EDM, a linear layer of one-hot vectors with a mean square of one
                nn.init.xavier_uniform_(module.weight, gain=math.sqrt(module.num_embeddings))
            if name in last or name.endswith((".conv2", ".to_out.0")):
                nn.init.zeros_(module.weight)


# -- The family -------------------------------------------------------------------------------------------------------

_SIZE = Field(int, low=1, high=65_536)
_PYRAMID = Field(str, choices=_PYRAMIDS)


class _NCSNPPFamily(ImageFamily[NCSNPP]):
    name = "ncsnpp"
    network = NCSNPP
    levels = (50, 0.01, 1000)
    class_before_embedding = True
    preconditions = (
        "karras",
        "ncsnpp",
        "ncsnpp_index",
        "vp",
        "subvp",
        "ddpm",
        "ddpm_v",
        "ddpm_x0",
        "ncsnv2",
        "ncsn",
        "flow",
        "flow_reverse",
    )
    keys: ClassVar[Mapping[str, Field]] = {
        "in_channels": _SIZE,
        "out_channels": _SIZE,
        "block_out_channels": Field(list, required=True, low=1, high=16, each=_SIZE),
        "layers_per_block": Field(int, low=1, high=64),
        "attention": Field(list, optional=True, low=1, high=16, each=Field(bool)),
        "time_embedding_type": Field(str, choices=_TIME_EMBEDDINGS),
        "resample_filter": Field(list, choices=_FILTERS),
        "input_pyramid": _PYRAMID,
        "output_pyramid": _PYRAMID,
        "dropout": Field(float, low=0, high=1),
        "num_class_embeds": Field(int, optional=True, low=1, high=10_000_000),
        "null_class": Field(bool),
        "center_input_sample": Field(bool),
        "model_channels": Field(int, optional=True, low=1, high=65_536),
        "time_proj_dim": Field(int, optional=True, low=2, high=65_536),
        "time_embedding_dim": Field(int, optional=True, low=1, high=65_536),
        "skip_rescale": Field(bool),
        "pyramid_filter": Field(bool),
        "patch": Field(int, low=1, high=64),
    }

    def design(self, given: Mapping[str, Any], size: tuple[int, ...], precondition: str) -> dict[str, Any]:
        architecture = super().design(given, size, precondition)
        widths = architecture["block_out_channels"]
        attention, patch, width = given["attention"], given["patch"], given["model_channels"]
        if attention is None:  # as published
            attention = [min(size) == 16 * patch * 2**scale for scale in range(len(widths))]
        return architecture | {
            "layers_per_block": given["layers_per_block"],
            "attention": list(map(bool, attention)),
            "time_embedding_type": given["embedding"],
            "resample_filter": given["resample_filter"],
            "input_pyramid": given["input_pyramid"],
            "output_pyramid": given["output_pyramid"],
            "model_channels": widths[0] if width is None else width,
            "dropout": given["dropout"],
            "num_class_embeds": given["classes"],
            "null_class": given["null_class"],
            # As published: images in [0, 1] are mapped to [-1, 1] by the rows, or else by the network.
            "center_input_sample": not ROWS[precondition].centered,
            "patch": patch,
        }

    def width(self, backbone: NCSNPP) -> int:
        return math.ceil(backbone.conv_in.out_channels / backbone.patch**2)

    def image_convolutions(self, backbone: NCSNPP) -> tuple[set[str], set[str]]:
        """The first and the last convolution, and those of pyramids whose levels are images."""
        down, up = self.skip_convolutions(backbone)
        first = down if backbone.input_pyramid == "skip" else down[:1]
        last = up if backbone.output_pyramid == "skip" else []
        return {"conv_in", *first}, {"conv_out", *last}


NCSNPP_FAMILY = _NCSNPPFamily()
