r"""Reduction of images by bicubic interpolation with antialiasing.

Along each axis the measurement is the product with a matrix, y = W x. The entry of W for a pixel of y and one of x is
k(t), where t is the distance of their centers in units of the larger of the two pixel sizes; each row is divided by its
sum. k is the cubic kernel

.. math:: k(t) = 1 - \tfrac{5}{2} t^2 + \tfrac{3}{2} |t|^3 \;(|t| < 1), \qquad
    2 - 4 |t| + \tfrac{5}{2} t^2 - \tfrac{1}{2} |t|^3 \;(1 \le |t| < 2).

These are the weights of ``torch.nn.functional.interpolate(mode="bicubic", antialias=True)`` and of Pillow.

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

    linear = separable = True
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
        return products(x, [_on(x.device, x.dtype, size, size // self.scale) for size in sizes])

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The product with the transposed matrix along each axis."""
        return products(y, [_on(y.device, y.dtype, size * self.scale, size).T for size in _sizes(y)])

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """The shape of y with larger sizes."""
        kept = y.ndim - spatial_axes(y)
        return (*y.shape[1:kept], *(size * self.scale for size in y.shape[kept:]))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The images enlarged with bicubic interpolation."""
        return products(y, [_on(y.device, y.dtype, size, size * self.scale) for size in _sizes(y)])

    def decomposition(self, x: Tensor) -> Decomposition:
        """The product of those of the matrices along the axes."""
        return decomposed(x, [_svd(size, size // self.scale) for size in _sizes(x)])


def products(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The products of x with a matrix along each of its last axes."""
    for axis, matrix in enumerate(matrices, x.ndim - len(matrices)):
        x = torch.movedim(torch.movedim(x, axis, -1) @ matrix.T.to(x), -1, axis)
    return x


def decomposed(x: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Decomposition:
    """The decomposition of ``products`` of samples like x from those of the matrices, (U, S, V^T)."""
    left, values, right = zip(*parts, strict=True)
    u, vt = ([matrix.to(x) for matrix in matrices] for matrices in (left, right))  # once, not in every call
    s = functools.reduce(lambda a, b: a[..., None] * b, values)
    return Decomposition(
        torch.where(s > s.max() * torch.finfo(x.dtype).eps, s, 0).to(x),
        lambda x: products(x, vt),
        lambda c: products(c, [each.T for each in vt]),
        lambda y: products(y, [each.T for each in u]),
    )


def _sizes(x: Tensor) -> Sequence[int]:
    return x.shape[-spatial_axes(x) :]


@functools.lru_cache(maxsize=16)
def _svd(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode(False):
        u, values, vt = torch.linalg.svd(weights(n, m), full_matrices=False)
        return u, values, vt


@functools.lru_cache(maxsize=16)
def _on(device: torch.device, dtype: torch.dtype, n: int, m: int) -> Tensor:
    """The weights on a device, to which they are not copied in every call."""
    with torch.inference_mode(False):
        return weights(n, m).to(dtype).to(device)  # which may not have float64


@functools.lru_cache(maxsize=16)
def weights(n: int, m: int, *, cubic: bool = True) -> Tensor:
    """The matrix (m, n) in float64 that resizes n values to m, with the cubic kernel or with a linear one, 1 - |t|."""
    with torch.inference_mode(False):
        places, centers = (torch.arange(size, dtype=torch.float64, device="cpu") + 0.5 for size in (n, m))
        t = ((places - centers[:, None] * (n / m)) / max(n / m, 1.0)).abs()
        near, far = 1 - 2.5 * t**2 + 1.5 * t**3, 2 - 4 * t + 2.5 * t**2 - 0.5 * t**3
        kernel = torch.where(t < 1, near, torch.where(t < 2, far, 0)) if cubic else (1 - t).clamp(min=0)
        return kernel / kernel.sum(1, keepdim=True)
