r"""Operators that are not linear: saturation, rounding, JPEG compression, and the modulus of the Fourier transform.

Where a measurement is rounded it has no gradient. ``linearized`` then takes the derivative to be the identity (the
straight-through approximation). The error of a value that is rounded to multiples of q is about uniform, with a
standard deviation of :math:`q / \sqrt{12}`. A sigma of this size lets restorations differ from y by as much.

References:
    Bengio et al., 2013, Estimating or Propagating Gradients Through Stochastic Neurons, arXiv:1308.3432, Sec. 4.
    Fienup, 1982, Phase Retrieval Algorithms: A Comparison.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from scorematch.core.arguments import argument, check_count, check_value
from scorematch.core.schema import Field
from scorematch.data.pictures import to_pixels
from scorematch.restoration.operator import Linearization, Operator, SameShape, spatial_axes

__all__ = ["JPEG", "Clip", "Magnitude", "Quantize"]


class _Rounding(SameShape):
    """An operator whose derivative is taken to be the identity."""

    def linearized(self, x: Tensor) -> Linearization:
        """The measurement, with the identity in place of the derivative."""
        return Linearization(self.measure(x), lambda u: u, lambda v: v)


class Clip(SameShape):
    """Saturation: values below ``low`` and above ``high`` are measured as ``low`` and ``high``.

    Where a value is saturated its derivative is 0.

    Args:
        low: the smallest value that is measured.
        high: the largest one.

    Raises:
        TypeError: if one of them is not a number.
        ValueError: if one is not finite, or ``low`` is not below ``high``.
    """

    form, help = "clip:LOW,HIGH", "values below LOW and above HIGH were cut off, as in an overexposed photograph"
    examples = ("clip:0.1,0.9", "clip:0,0.7")

    def __init__(self, low: float, high: float) -> None:
        check_value("low", low, Field(float))
        check_value("high", high, Field(float))
        if low >= high:
            raise ValueError(f"{argument('low')} must be below {argument('high')}, got {low} and {high}.")
        self.low, self.high = low, high

    def measure(self, x: Tensor) -> Tensor:
        """The clipped values, of x's shape."""
        return x.clamp(self.low, self.high)


class Quantize(_Rounding):
    """Rounding of values in [0, 1] to levels of equal distance, the lowest 0 and the highest 1.

    Args:
        levels: the number of levels, from 2 to 2^24, those of float32.

    Raises:
        TypeError: if ``levels`` is not an integer.
        ValueError: if ``levels`` is out of range.
    """

    value_range = (0, 1)
    form, help = "quantize:LEVELS", "each value was rounded to one of LEVELS levels"
    examples = ("quantize:4", "quantize:2", "quantize:8")

    def __init__(self, levels: int) -> None:
        self.levels = check_count("levels", levels, 2, 2**24)

    def measure(self, x: Tensor) -> Tensor:
        """The rounded values, of x's shape."""
        return x.detach().clamp(0, 1).mul(self.levels - 1).round() / (self.levels - 1)


class JPEG(_Rounding):
    """JPEG compression and decompression with Pillow (the extra ``images``) and its default chroma subsampling, 4:2:0.

    Values are clamped to [0, 1] and rounded to 8 bits. The result has no gradient:
    ``linearized`` takes the derivative to be the identity.

    Args:
        quality: the JPEG quality, from 1 to 100.

    Raises:
        TypeError: if ``quality`` is not an integer.
        ValueError: if ``quality`` is below 1 or above 100.
        ImportError: without Pillow.
    """

    value_range = (0, 1)
    form, help = "jpeg:QUALITY", "compression as JPEG of this quality, 1 to 100"
    examples = ("jpeg:5", "jpeg:10", "jpeg:20", "jpeg:50")

    def __init__(self, quality: int) -> None:
        self.quality = check_count("quality", quality, most=100)
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError('JPEG needs Pillow: pip install "scorematch[images]".') from error

    def measure(self, x: Tensor) -> Tensor:
        """The images (N, 1 or 3, H, W) after encoding and decoding, of x's shape and dtype, in [0, 1]."""
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"JPEG needs images (N, 1, H, W) or (N, 3, H, W), got shape {tuple(x.shape)}.")
        pixels = x.detach().float().cpu().clamp(0, 1).mul(255).round().to(torch.uint8)
        decoded = torch.stack([self._code(image) for image in pixels])
        return decoded.to(x.device, x.dtype).div_(255)

    def _code(self, image: Tensor) -> Tensor:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(to_pixels(image)).save(file, "JPEG", quality=self.quality)
        return rearrange(torch.from_numpy(np.array(Image.open(file))), "h w ... -> (...) h w")


class Magnitude(Operator):
    """Phase retrieval: the modulus of the orthonormal Fourier transform of samples among zeros.

    All axes after the channels are enlarged with zeros at their end: (N, C, H, W) -> (N, C, k H, k W). A sample, the
    sample that is rotated by 180 degrees, and their negatives have the same measurement.

    Args:
        oversampling: k, an integer of at least 1. For an image to be determined up to these, k must be at least 2.

    Raises:
        TypeError: if ``oversampling`` is not an integer.
        ValueError: if it is below 1.

    Example:
        >>> Magnitude(2).measure(torch.ones(1, 1, 4, 4))[0, 0, 0, 0]  # the sum of all pixels / 8
        tensor(2.)
    """

    def __init__(self, oversampling: int = 2) -> None:
        self.oversampling = check_count("oversampling", oversampling)

    def measure(self, x: Tensor) -> Tensor:
        """The modulus, without the phase."""
        axes = tuple(range(-spatial_axes(x), 0))
        sizes = [x.shape[axis] * self.oversampling for axis in axes]
        exact = x.to(torch.promote_types(x.dtype, torch.float32))  # there is no Fourier transform in bfloat16
        return torch.fft.fftn(exact, sizes, axes, "ortho").abs().to(x.dtype)

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """The shape of y with smaller sizes."""
        kept = y.ndim - spatial_axes(y)
        return (*y.shape[1:kept], *(size // self.oversampling for size in y.shape[kept:]))
