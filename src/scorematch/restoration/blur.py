r"""Blur: the convolution of a sample with a kernel, by the discrete Fourier transform.

Let the kernel k have odd sizes, with its center at 0. The measurement of a sample x is

.. math:: y_i = \sum_j k_j\, x_{i - j},

where the values outside of the sample are those of its opposite side ("circular"), mirrored at the outermost value
("reflect"), or zero ("zeros"). With the boundary "circular" the Fourier transform of y is that of x times
:math:`\hat k`, the Fourier transform of the kernel.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from scorematch.core.arguments import check_choice, check_value
from scorematch.core.schema import Field
from scorematch.restoration.decomposition import Decomposition, hartley
from scorematch.restoration.operator import Operator, kind_of, spatial_axes

__all__ = ["Blur", "GaussianBlur", "MotionBlur"]

Boundary = Literal["circular", "reflect", "zeros"]
_BOUNDARIES = ("circular", "reflect", "zeros")
_SIZE = Field(float, above=0, high=10_000)  # in pixels
_TAIL = 3  # standard deviations from the center to the border of a Gaussian kernel
_POINTS = 1000  # on a motion for each pixel of its length


class Blur(Operator):
    """The convolution with a kernel, over as many of the last axes of the samples as the kernel has.

    Args:
        kernel: floating point, (h, w) for images or (l,) for signals. Its sizes are odd.
        boundary: which values are outside of the sample: "circular", "reflect" or "zeros".

    Raises:
        TypeError: if the kernel is not a floating-point tensor.
        ValueError: if a size of the kernel is even, or its values are not finite.

    Example:
        >>> Blur(torch.tensor([0.5, 0.5, 0.0])).measure(torch.tensor([[1.0, 2.0, 4.0, 8.0]])).round(decimals=4)
        tensor([[1.5000, 3.0000, 6.0000, 4.5000]])
    """

    linear = True

    def __init__(self, kernel: Tensor, boundary: Boundary = "circular") -> None:
        check_choice("boundary", boundary, _BOUNDARIES)
        if not isinstance(kernel, Tensor) or not kernel.is_floating_point() or not kernel.ndim:
            raise TypeError(f"kernel must be a floating-point tensor (h, w) or (l,), got {kind_of(kernel)}.")
        if any(size % 2 == 0 for size in kernel.shape):
            raise ValueError(
                f"the sizes of a kernel must be odd, so that it has a center, got {_size(kernel.shape)}. Add a row or "
                "a column of zeros."
            )
        if not bool(torch.isfinite(kernel).all()):
            raise ValueError("kernel must be finite, got NaN or infinite values.")
        self.kernel: Tensor = kernel.detach().clone()
        self.boundary: Boundary = boundary

    def __repr__(self) -> str:
        if type(self) is not Blur:
            return super().__repr__()
        return f"Blur({_size(self.kernel.shape)} kernel, {self.boundary!r})"

    def measure(self, x: Tensor) -> Tensor:
        """The blurred samples, of x's shape."""
        return self._convolved(self._extended(x), x.shape)

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The convolution with the mirrored kernel; for "reflect", by automatic differentiation."""
        if self.boundary == "reflect":
            return super().adjoint(y)
        return self._convolved(self._extended(y), y.shape, transposed=True)

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """That of y."""
        return tuple(y.shape[1:])

    def to(self, device: torch.device | str) -> Blur:
        """The operator with its kernel on a device."""
        new = copy.copy(self)
        new.kernel = self.kernel.to(torch.float32).to(device)
        return new

    def decomposition(self, x: Tensor) -> Decomposition | None:
        r"""For the boundary "circular" the singular values are the absolute values of :math:`\hat k`."""
        if self.boundary != "circular":
            return super().decomposition(x)
        self._check_size(x)
        axes = self._last(x)
        transfer = torch.fft.fftn(self._placed([x.shape[axis] for axis in axes], x))
        values = transfer.abs()
        values = torch.where(values > values.max() * torch.finfo(values.dtype).eps, values, 0)
        phase = torch.where(values > 0, transfer.conj() / values, 0)
        return Decomposition(
            values, lambda x: hartley(x, axes), lambda c: hartley(c, axes), lambda y: hartley(y, axes, phase)
        )

    def _of(self, x: Tensor) -> Tensor:
        """The kernel for samples like x."""
        return self.kernel

    def _last(self, x: Tensor) -> tuple[int, ...]:
        """The axes of x that are blurred."""
        return tuple(range(x.ndim - len(self._sizes_of(x)), x.ndim))

    def _sizes_of(self, x: Tensor) -> Sequence[int]:
        """The sizes of the kernel for samples like x."""
        return self.kernel.shape

    def _check_size(self, x: Tensor) -> None:
        kernel = self._sizes_of(x)
        if x.ndim <= len(kernel) or any(size > n for size, n in zip(kernel, x.shape[-len(kernel) :], strict=True)):
            raise ValueError(f"a kernel of {_size(kernel)} is too large for samples of shape {tuple(x.shape[1:])}.")

    def _placed(self, sizes: Sequence[int], like: Tensor) -> Tensor:
        """The kernel among zeros, for samples of some sizes, with its center in the first place."""
        placed, kernel = like.new_zeros(tuple(sizes)), self._of(like).to(like)
        placed[tuple(map(slice, kernel.shape))] = kernel
        centers = [-(size // 2) for size in kernel.shape]
        return placed.roll(centers, tuple(range(placed.ndim)))

    def _extended(self, x: Tensor) -> Tensor:
        """X with half of the kernel's size of outer values at each border; unchanged for "circular"."""
        self._check_size(x)
        kernel = self._of(x).shape
        for axis, size in enumerate(kernel, x.ndim - len(kernel)):
            r, n = size // 2, x.shape[axis]
            if self.boundary == "circular" or not r:
                continue
            before, after = x.narrow(axis, 1, r).flip(axis), x.narrow(axis, n - 1 - r, r).flip(axis)
            if self.boundary == "zeros":
                before = after = torch.zeros_like(before)
            x = torch.cat([before, x, after], axis)
        return x

    def _convolved(self, x: Tensor, shape: Sequence[int], *, transposed: bool = False) -> Tensor:
        """The circular convolution of x, cut to a shape in the middle."""
        axes = self._last(x)
        sizes = [x.shape[axis] for axis in axes]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))  # there is no Fourier transform in bfloat16
        transfer = torch.fft.rfftn(self._placed(sizes, exact))
        spectrum = torch.fft.rfftn(exact, dim=axes) * (transfer.conj() if transposed else transfer)
        x = torch.fft.irfftn(spectrum, sizes, axes).to(x.dtype)
        for axis in axes:
            x = x.narrow(axis, (x.shape[axis] - shape[axis]) // 2, shape[axis])
        return x


class GaussianBlur(Blur):
    r"""Blur with a Gaussian kernel, :math:`k_j \propto \exp(-j^2 / 2 s^2)`, about that of a lens out of focus.

    The kernel ends at three standard deviations, rounded up to whole pixels, and its sum is 1. All axes after the
    channels are blurred: one of signals (N, C, L), two of images; for vectors (N, D), their only axis.

    Args:
        deviation: the standard deviation s in pixels, positive, at most 10,000.
        boundary: as for ``Blur``.

    Attributes:
        kernel: the kernel along one axis; that of several axes is the product.

    Raises:
        TypeError: if ``deviation`` is not a number.
        ValueError: if ``deviation`` is out of range.
    """

    separable = True
    form, help = "blur:DEVIATION", "they are blurred by a Gaussian kernel with this standard deviation in pixels"
    examples = ("blur:2", "blur:1", "blur:4")

    def __init__(self, deviation: float, *, boundary: Boundary = "circular") -> None:
        check_value("deviation", deviation, _SIZE)
        self.deviation = deviation
        r = math.ceil(_TAIL * deviation)
        weights = torch.exp(-torch.arange(-r, r + 1, device="cpu").double().square() / (2 * deviation**2))
        super().__init__(weights / weights.sum(), boundary)

    def _sizes_of(self, x: Tensor) -> Sequence[int]:
        return [len(self.kernel)] * spatial_axes(x)

    def _of(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda a, b: a[..., None] * b, [self.kernel] * spatial_axes(x))


class MotionBlur(Blur):
    """Blur of images by a straight motion of the camera: the mean over a line segment with the pixel in its middle.

    The weight of a pixel is the share of the segment that lies in it.

    Args:
        length: the length of the segment in pixels, positive, at most 10,000.
        angle: its direction in degrees, counterclockwise; 0 is along the rows.
        boundary: as for ``Blur``.

    Raises:
        TypeError: if ``length`` or ``angle`` is not a number.
        ValueError: if ``length`` is out of range, or ``angle`` not finite.
    """

    form, help = "motion:LENGTH,ANGLE", "the camera moved by LENGTH pixels in a direction, in degrees from the rows"
    examples = ("motion:9,45", "motion:5,0", "motion:15,45")

    def __init__(self, length: float, angle: float = 0, *, boundary: Boundary = "circular") -> None:
        check_value("length", length, _SIZE)
        check_value("angle", angle, Field(float))
        self.length, self.angle = length, angle
        n = _POINTS * math.ceil(length)
        place = ((torch.arange(n, device="cpu").double() + 0.5) / n - 0.5) * length
        down, right = (place * -math.sin(math.radians(angle))).round(), (place * math.cos(math.radians(angle))).round()
        kernel = torch.zeros(
            *(2 * int(each.abs().max()) + 1 for each in (down, right)), dtype=torch.float64, device="cpu"
        )
        pixels = [(each - each.min()).long() for each in (down, right)]
        super().__init__(kernel.index_put_(tuple(pixels), kernel.new_tensor(1 / n), accumulate=True), boundary)

    def _of(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"{self!r} needs images (N, C, H, W), got shape {tuple(x.shape)}.")
        return self.kernel


def _size(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
