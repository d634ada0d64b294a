r"""Convolutions and resampling by two in one, two or three dimensions, and what lies beyond the ends of each axis.

Data have the shape (N, C, L), (N, C, H, W) or (N, C, D, H, W). Beyond the ends of an axis lie zeros, the data again for
a periodic axis ("circular"), or the data mirrored at the last value ("reflect"). With "circular" on all axes a network
commutes with shifts by multiples of its largest stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, cast, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from scorematch.core.arguments import check_choice

Padding = Literal["zeros", "circular", "reflect"]
PADDINGS = get_args(Padding)
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class Space(NamedTuple):
    """The axes of the data.

    Attributes:
        padding: what lies beyond the ends of each axis, a name in ``PADDINGS``.
    """

    padding: tuple[str, ...] = ("zeros", "zeros")

    @classmethod
    def of(cls, dimensions: int, padding: str | Sequence[str]) -> Space:
        """The axes with one padding for all, or one for each.

        Raises:
            ValueError: if a padding does not exist, or there is not one for each axis.
        """
        each = (padding,) * dimensions if isinstance(padding, str) else tuple(padding)
        for name in each:
            check_choice("padding", name, PADDINGS)
        if len(each) != dimensions:
            raise ValueError(f"padding must be one name, or one for each of {dimensions} axes, got {list(each)}.")
        return cls(each)

    @property
    def dimensions(self) -> int:
        """The number of axes."""
        return len(self.padding)

    def conv(
        self, inputs: int, outputs: int, size: int = 3, *, stride: int = 1, padding: int | None = None
    ) -> Convolution:
        """A convolution whose result has the size of its input, divided by the stride.

        Args:
            inputs: the number of channels of the input.
            outputs: the number of channels of the output.
            size: the side of the kernel, odd.
            stride: the stride.
            padding: the number of values on each side of each axis; None is ``size // 2``.
        """
        padding = size // 2 if padding is None else padding
        if padding == 0 or set(self.padding) == {"zeros"}:
            return _CONVOLUTIONS[self.dimensions](inputs, outputs, size, stride=stride, padding=padding)
        made = _PADDED[self.dimensions](inputs, outputs, size, stride=stride)
        made.sides, made.modes = padding, self.padding
        return cast(Convolution, made)

    def to_multiple(self, x: Tensor, divisor: int) -> Tensor:
        """Data whose sides are multiples of the divisor: the last value is repeated, or the first ones of a circle."""
        missing = [-side % divisor for side in x.shape[2:]]
        for axis, (more, mode) in enumerate(zip(missing, self.padding, strict=True)):
            if more:
                x = _pad(x, axis, (0, more), "circular" if mode == "circular" else "replicate")
        return x


def _pad(x: Tensor, axis: int, sides: tuple[int, int], mode: str) -> Tensor:
    """Pads one spatial axis of x; the reflection of a single value is this value."""
    if mode == "reflect" and x.shape[2 + axis] == 1:
        mode = "replicate"
    widths = [0, 0] * (x.ndim - 2)
    last_first = 2 * (x.ndim - 3 - axis)
    widths[last_first : last_first + 2] = sides
    return F.pad(x, widths, mode="constant" if mode == "zeros" else mode)


class _Padded:
    """A convolution that pads each axis in its own way."""

    sides: int
    modes: tuple[str, ...]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for axis, mode in enumerate(self.modes):
            x = _pad(x, axis, (self.sides, self.sides), mode)
        return super()._conv_forward(x, weight, bias)  # type: ignore[misc]


class _Padded1d(_Padded, nn.Conv1d):
    pass


class _Padded2d(_Padded, nn.Conv2d):
    pass


class _Padded3d(_Padded, nn.Conv3d):
    pass


_PADDED: dict[int, type[_Padded1d] | type[_Padded2d] | type[_Padded3d]] = {1: _Padded1d, 2: _Padded2d, 3: _Padded3d}


# -- Resampling by two ------------------------------------------------------------------------------------------------


def mean_down(x: Tensor) -> Tensor:
    """Downsamples every spatial axis by two: the mean of two neighbors along each."""
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3](x, 2)


def nearest_up(x: Tensor) -> Tensor:
    """Upsamples every spatial axis by two: repeats each value twice."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def to_patches(x: Tensor, patch: int) -> Tensor:
    """Moves the values of each patch to channels, (N, C, H, W) -> (N, C patch^2, H / patch, W / patch)."""
    if x.ndim == 4:
        return F.pixel_unshuffle(x, patch)
    for axis in range(2, x.ndim):
        x = x.unflatten(2 * axis - 2, (-1, patch))  # the axes before are split already
    order = [0, 1, *range(3, x.ndim, 2), *range(2, x.ndim, 2)]
    return x.permute(order).flatten(1, x.ndim // 2)


def from_patches(x: Tensor, patch: int) -> Tensor:
    """The inverse of ``to_patches``."""
    if x.ndim == 4:
        return F.pixel_shuffle(x, patch)
    axes = x.ndim - 2
    x = x.unflatten(1, (-1, *[patch] * axes))
    order = [0, 1, *(each for i in range(axes) for each in (2 + axes + i, 2 + i))]
    x = x.permute(order)
    for axis in range(2, 2 + axes):
        x = x.flatten(axis, axis + 1)
    return x
