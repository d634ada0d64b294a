r"""Reduction of images as photographs are made smaller: bicubic interpolation with antialiasing.

Along each axis the measurement is the product with a matrix, y = W x, which holds the weights of
``torch.nn.functional.interpolate(mode="bicubic", antialias=True)``: a cubic kernel (a = -1/2) as wide as four pixels of
the small image. Pillow uses the same weights.

References:
    Keys, 1981, Cubic Convolution Interpolation for Digital Image Processing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.restoration.decomposition import Decomposition
from scorematch.restoration.operator import Operator, spatial_axes

__all__ = ["Resize"]


class Resize(Operator):
    """Observes images that were made smaller with antialiased bicubic interpolation.

    All axes after the channels get smaller: one of signals (N, C, L), two of images.

    Args:
        scale: how many times smaller, an integer. It must divide the sizes of the images.

    Raises:
        TypeError: if ``scale`` is not an integer.
        ValueError: if ``scale`` is below 1.

    Example:
        >>> Resize(4).measure(torch.rand(1, 3, 32, 64)).shape
        torch.Size([1, 3, 8, 16])
    """

    linear = True
    form, help = "resize:SCALE", "they were made SCALE times smaller, with antialiased bicubic interpolation"
    examples = ("resize:4", "resize:2", "resize:7", "resize:8")

    def __init__(self, scale: int) -> None:
        self.scale = check_count("scale", scale)

    def measure(self, x: Tensor) -> Tensor:
        """The smaller images."""
        sizes = _sizes(x)
        if any(size % self.scale for size in sizes):
            raise ValueError(
                f"{self!r} needs samples whose sizes are multiples of {self.scale}, got shape {tuple(x.shape[1:])}."
            )
        return self._products(x, [weights(size, size // self.scale) for size in sizes])

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The product with the transposed matrix along each axis."""
        return self._products(y, [weights(size * self.scale, size).T for size in _sizes(y)])

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """The shape of y with larger sizes."""
        kept = y.ndim - spatial_axes(y)
        return (*y.shape[1:kept], *(size * self.scale for size in y.shape[kept:]))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The images enlarged with bicubic interpolation."""
        return self._products(y, [weights(size, size * self.scale) for size in _sizes(y)])

    def decomposition(self, x: Tensor) -> Decomposition:
        """The product of those of the matrices along the axes."""
        u, values, vt = zip(*(_svd(size, size // self.scale) for size in _sizes(x)), strict=True)
        return Decomposition(
            functools.reduce(lambda a, b: a[..., None] * b, values).to(x),
            lambda x: self._products(x, vt),
            lambda c: self._products(c, [each.T for each in vt]),
            lambda y: self._products(y, [each.T for each in u]),
        )

    def _products(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        for axis, matrix in enumerate(matrices, x.ndim - len(matrices)):
            x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T.to(x), -1, axis)
        return x


def _sizes(x: Tensor) -> Sequence[int]:
    return x.shape[-spatial_axes(x) :]


@functools.lru_cache(maxsize=16)
def _svd(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        u, values, vt = torch.linalg.svd(weights(n, m), full_matrices=False)
        return u, values, vt


@functools.lru_cache(maxsize=16)
def weights(n: int, m: int) -> Tensor:
    """The matrix (m, n) in float64 that resizes n values to m."""
    with torch.inference_mode(False):
        unit = torch.eye(n, dtype=torch.float64, device="cpu")[None, None]
        return torch.nn.functional.interpolate(unit, (m, n), mode="bicubic", antialias=True)[0, 0]
