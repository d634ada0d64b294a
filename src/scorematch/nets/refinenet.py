r"""The RefineNets of NCSN and NCSNv2, in three depths, with normalization layers that depend on the noise level or not.

An encoder of pre-activation residual blocks computes features at several scales; one refine block per scale, from the
lowest resolution to the highest, merges them (RefineNet, Lin et al. 2017). After one to three halvings of height and
width the encoder uses dilated convolutions instead, so that the deepest features keep their resolution.

=================  ==========================  ============================
                   NCSN                        NCSNv2
=================  ==========================  ============================
norms              conditional, everywhere     unconditional, encoder only
chained pooling    average                     max
output             the score                   sigma times the score
=================  ==========================  ============================

Submodules have the names of the published weights, since these names are the file format.

References:
    Song & Ermon, 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv:1907.05600, App. A.
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011, App. B.
    Lin et al., 2017, RefineNet: Multi-Path Refinement Networks, arXiv:1611.06612.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.arguments import check_choice
from scorematch.core.conditions import Condition
from scorematch.core.schema import Field
from scorematch.nets.family import Family, structure
from scorematch.nets.layers import Activation, ConditionalInstanceNormPlus, InstanceNormPlus
from scorematch.nets.precondition import ROWS

Depth = Literal["standard", "deeper", "deepest"]
MakeNorm = Callable[[int], nn.Module]


class _Stage(NamedTuple):
    """One stage of the encoder."""

    suffix: str  # of the names of the submodules: res1, refine1
    width: int  # the number of channels, in multiples of the base width
    halve: bool = False
    dilation: int = 1


_FIRST, _HALVED = _Stage("1", 1), _Stage("2", 2, halve=True)
_DILATED = _Stage("4", 4, dilation=2), _Stage("5", 4, dilation=4)
# The encoder, from the image to the deepest features.
_ENCODERS: dict[str, tuple[_Stage, ...]] = {
    "standard": (_FIRST, _HALVED, _Stage("3", 2, dilation=2), _Stage("4", 2, dilation=4)),
    "deeper": (_FIRST, _HALVED, _Stage("3", 2, halve=True), *_DILATED),
    "deepest": (_FIRST, _HALVED, _Stage("3", 2, halve=True), _Stage("31", 2, halve=True), *_DILATED),
}
# The suffixes of the refine blocks, from the deepest features to the image.
_REFINE = {"standard": ("1", "2", "3", "4"), "deeper": ("1", "2", "3", "4", "5")}
_REFINE["deepest"] = ("1", "2", "31", "3", "4", "5")


def _conv3x3(inputs: int, outputs: int, *, bias: bool = True, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=bias)


class _NoNorm(nn.Module):
    """Takes the place of a norm in networks without them, and applies its activation."""

    def forward(self, x: Tensor, position: Tensor | None, activation: Activation | None = None) -> Tensor:
        return x if activation is None else activation(x)


class _ConvMeanPool(nn.Module):
    """A convolution followed by 2x2 average pooling."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(x), 2)


class _ResidualBlock(nn.Module):
    """norm, ELU, conv, norm, ELU, conv; the shortcut of the input is added to the result."""

    def __init__(
        self, inputs: int, outputs: int, norm: MakeNorm, *, first: bool, halve: bool = False, dilation: int = 1
    ) -> None:
        super().__init__()
        # The first block of a stage changes the width in its second convolution.
        self.normalize1 = norm(inputs)
        self.conv1 = _conv3x3(inputs, inputs, dilation=dilation)
        self.normalize2 = norm(inputs)
        self.conv2: nn.Module
        self.shortcut: nn.Module | None = None
        if halve:
            self.conv2 = _ConvMeanPool(inputs, outputs, 3)
            self.shortcut = _ConvMeanPool(inputs, outputs, 1)
        else:
            self.conv2 = _conv3x3(inputs, outputs, dilation=dilation)
            # The published networks have a convolution here even if the width does not change.
            self.shortcut = _conv3x3(inputs, outputs, dilation=dilation) if first and dilation > 1 else None

    def forward(self, x: Tensor, position: Tensor | None) -> Tensor:
        h = self.conv1(self.normalize1(x, position, F.elu))
        h = self.conv2(self.normalize2(h, position, F.elu))
        return h + (x if self.shortcut is None else self.shortcut(x))


class _ResidualConvUnits(nn.Module):
    """A number of residual units, each of twice [norm,] ELU, conv (RefineNet's RCU)."""

    def __init__(self, width: int, blocks: int, norm: MakeNorm) -> None:
        super().__init__()
        self.names = [(f"{block}_1", f"{block}_2") for block in range(1, blocks + 1)]
        for name in itertools.chain(*self.names):
            self.add_module(f"{name}_norm", norm(width))
            self.add_module(f"{name}_conv", _conv3x3(width, width, bias=False))

    def forward(self, x: Tensor, position: Tensor | None) -> Tensor:
        for names in self.names:
            h = x
            for name in names:
                h = getattr(self, f"{name}_norm")(h, position, F.elu)
                h = getattr(self, f"{name}_conv")(h)
            x = h + x
        return x


class _MultiResolutionFusion(nn.Module):
    """[norm,] conv on each input; the results are resized to the size of the first and summed (RefineNet's MSF)."""

    def __init__(self, inputs: Sequence[int], outputs: int, norm: MakeNorm) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv3x3(width, outputs) for width in inputs)
        self.norms = nn.ModuleList(norm(width) for width in inputs)

    def forward(self, xs: Sequence[Tensor], position: Tensor | None) -> Tensor:
        total, *others = (conv(norm(x, position)) for conv, norm, x in zip(self.convs, self.norms, xs, strict=True))
        for h in others:
            if h.shape[2:] != total.shape[2:]:
                h = F.interpolate(h, size=total.shape[2:], mode="bilinear", align_corners=True)
            total = total + h
        return total


class _ChainedResidualPooling(nn.Module):
    """ELU, then twice in a chain [norm,] 5x5 pooling, conv; each result is added to the sum (RefineNet's CRP)."""

    def __init__(self, width: int, norm: MakeNorm) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv3x3(width, width, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(norm(width) for _ in range(2))
        self.pool = F.max_pool2d if isinstance(self.norms[0], _NoNorm) else F.avg_pool2d

    def forward(self, x: Tensor, position: Tensor | None) -> Tensor:
        path = x = F.elu(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            path = conv(self.pool(norm(path, position), 5, stride=1, padding=2))
            x = x + path
        return x


class _RefineBlock(nn.Module):
    """Residual units on each input, multi-resolution fusion, chained residual pooling, residual units."""

    def __init__(self, inputs: Sequence[int], outputs: int, norm: MakeNorm, *, last: bool) -> None:
        super().__init__()
        self.adapt_convs = nn.ModuleList(_ResidualConvUnits(width, 2, norm) for width in inputs)
        self.msf = _MultiResolutionFusion(inputs, outputs, norm) if len(inputs) > 1 else None
        self.crp = _ChainedResidualPooling(outputs, norm)
        self.output_convs = _ResidualConvUnits(outputs, 3 if last else 1, norm)

    def forward(self, xs: Sequence[Tensor], position: Tensor | None) -> Tensor:
        hs = [adapt(x, position) for adapt, x in zip(self.adapt_convs, xs, strict=True)]
        h = hs[0] if self.msf is None else self.msf(hs, position)
        return self.output_convs(self.crp(h, position), position)


class RefineNet(nn.Module):
    """The network of NCSN (``levels`` is a number) and of NCSNv2 (``levels`` is None).

    Args:
        channels: the number of channels of an image.
        width: the number of channels of the first feature map, at least 2; 64 and 128 in the published networks.
        depth: "standard" halves height and width once (NCSN, NCSNv2), "deeper" twice (NCSNv2Deeper), "deepest" three
            times (NCSNv2Deepest).
        levels: the number of noise levels for which the norms have parameters, or None for norms that do not depend on
            the noise level.
        center: whether to map the input from [0, 1] to [-1, 1].

    Attributes:
        divisor: height and width must be multiples of this number: 2, 4 or 8.
    """

    def __init__(
        self, channels: int, width: int, *, depth: Depth = "standard", levels: int | None = None, center: bool = True
    ) -> None:
        super().__init__()
        check_choice("depth", depth, _ENCODERS)
        if channels < 1 or width < 2:
            raise ValueError(
                f"channels must be at least 1, and width at least 2 for the variance over channels in the norms, got "
                f"channels={channels}, width={width}."
            )
        if levels is not None and levels < 1:
            raise ValueError(f"levels must be at least 1, or None for norms without noise level, got {levels}.")
        self.channels, self.levels, self.center = channels, levels, center
        self.divisor = 2 ** sum(stage.halve for stage in _ENCODERS[depth])

        def norm(channels: int) -> nn.Module:
            return InstanceNormPlus(channels) if levels is None else ConditionalInstanceNormPlus(channels, levels)

        def refine_norm(channels: int) -> nn.Module:
            return _NoNorm() if levels is None else norm(channels)

        self.begin_conv = _conv3x3(channels, width)
        inputs = width
        skips: list[int] = []
        self._encoder: list[str] = []
        for suffix, multiple, halve, dilation in _ENCODERS[depth]:
            outputs = multiple * width
            stage = nn.ModuleList(
                [
                    _ResidualBlock(inputs, outputs, norm, first=True, halve=halve, dilation=dilation),
                    _ResidualBlock(outputs, outputs, norm, first=False, dilation=dilation),
                ]
            )
            self._encoder.append(f"res{suffix}")
            self.add_module(f"res{suffix}", stage)
            skips.append(outputs)
            inputs = outputs
        self._refine: list[str] = []
        below: list[int] = []  # the width of the previous refine block's output; empty for the first block
        for suffix in _REFINE[depth]:
            merged = [skips.pop(), *below]
            outputs = skips[-1] if skips else width
            block = _RefineBlock(merged, outputs, refine_norm, last=not skips)
            self._refine.append(f"refine{suffix}")
            self.add_module(f"refine{suffix}", block)
            below = [outputs]
        self.normalizer = norm(width)
        self.end_conv = _conv3x3(width, channels)
        self.built = structure(self)

    def forward(self, x: Tensor, position: Tensor | None = None) -> Tensor:
        """The raw output of the network, of x's shape.

        Args:
            x: images (N, C, H, W); height and width are multiples of ``divisor`` and at least twice as large.
            position: the position of the noise level in the schedule, () or (N,), possibly fractional; ignored if
                ``levels`` is None.
        """
        self._check(x, position)
        h = self.begin_conv(2 * x - 1 if self.center else x)
        skips = []
        for name in self._encoder:
            for block in self._modules[name]:  # type: ignore[union-attr]
                h = block(h, position)
            skips.append(h)
        below: list[Tensor] = []
        for name in self._refine:
            below = [self._modules[name]([skips.pop(), *below], position)]  # type: ignore[misc]
        return self.end_conv(self.normalizer(below[0], position, F.elu))

    def _check(self, x: Tensor, position: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be images (N, {self.channels}, H, W), got shape {tuple(x.shape)}.")
        height, width = x.shape[2:]
        d = self.divisor
        if height % d or width % d or min(height, width) < 2 * d:
            raise ValueError(
                f"height and width must be multiples of {d} and at least {2 * d}, got {height}x{width}. Crop or pad "
                "the images."
            )
        if self.levels is not None and position is None:
            raise ValueError("the norms of this network depend on the noise level: pass position=.")


# -- The families -----------------------------------------------------------------------------------------------------

_KEYS: Mapping[str, Field] = {
    "channels": Field(int, required=True, low=1, high=65_536),
    "width": Field(int, required=True, low=2, high=65_536),
    "depth": Field(str, required=True, choices=tuple(_ENCODERS)),
}


class _RefineNetFamily(Family[RefineNet]):
    network = RefineNet
    keys = _KEYS
    conditional: ClassVar[bool]  # whether the norms depend on the noise level

    def build(self, architecture: Mapping[str, Any], *, levels: int, precondition: str) -> RefineNet:
        return RefineNet(
            architecture["channels"],
            architecture["width"],
            depth=architecture["depth"],
            levels=levels if self.conditional else None,
            center=not ROWS[precondition].centered,
        )

    def accepts(self, backbone: RefineNet) -> bool:
        return (backbone.levels is not None) == self.conditional

    def check(self, backbone: RefineNet, *, levels: int, precondition: str) -> None:
        super().check(backbone, levels=levels, precondition=precondition)
        if backbone.levels is not None and backbone.levels != levels:
            raise ValueError(
                f"the norms of the network have parameters for {backbone.levels} noise levels, but the schedule has "
                f"{levels}. Pass the schedule that the network was trained on."
            )

    def condition(self, backbone: RefineNet, *, predicts_variance: bool) -> Condition:
        return Condition()

    def width(self, backbone: RefineNet) -> int:
        return backbone.begin_conv.out_channels

    def image_convolutions(self, backbone: RefineNet) -> tuple[set[str], set[str]]:
        return {"begin_conv"}, {"end_conv"}

    def level_modules(self, backbone: RefineNet) -> set[str]:
        return set()


class _NCSN(_RefineNetFamily):
    name = "ncsn"
    conditional = True
    levels = (1, 0.01, 10)
    preconditions = ("ncsn",)

    def fix_level(self, copy: RefineNet) -> Callable[[Tensor], None]:
        """Each norm stores its parameters for the level."""
        norms = [module for module in copy.modules() if isinstance(module, ConditionalInstanceNormPlus)]

        def set_level(position: Tensor) -> None:
            for norm in norms:
                norm.fixed = norm.rows(position)

        return set_level


class _NCSNv2(_RefineNetFamily):
    name = "ncsnv2"
    conditional = False
    levels = (50, 0.01, 232)
    preconditions = ("ncsnv2", "karras")

    def fix_level(self, copy: RefineNet) -> Callable[[Tensor], None]:
        """Nothing in it depends on the noise level."""
        return lambda position: None


NCSN, NCSNV2 = _NCSN(), _NCSNv2()
