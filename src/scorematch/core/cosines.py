r"""Orthonormal cosines along all axes of a sample, and bands of them with about the same frequency.

Statistics of natural images and signals depend little on the position, and the discrete cosine transform F nearly
diagonalizes their covariance. Along the channels of color images its three rows are nearly the brightness and two
opponent colors.

References:
    Field, 1987, Relations between the statistics of natural images and the response properties of cortical cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BANDS = 4  # per doubling of the frequency


class Cosines:
    """The transform F of samples, and its bands: those of the lowest channel cosine first, from low to high frequency.

    Args:
        x: a batch (N, ...), for its shape, dtype and device.

    Attributes:
        frequency: the frequency of each cosine (...), in units of the lowest one, float64.
        bands: the number of bands.
    """

    def __init__(self, x: Tensor) -> None:
        self._shape = x.shape[1:]
        self._matrices = [_transform(n).to(x) for n in self._shape]
        self.frequency = _frequency(self._shape)
        band = (_BANDS * (1 + self.frequency).log2()).round().long()
        if len(self._shape) > 1:  # the first axis has the channels, each cosine of which has bands of its own
            band = band + (1 + band.max()) * torch.arange(self._shape[0], device="cpu").view(
                -1, *[1] * (len(self._shape) - 1)
            )
        _, band = band.flatten().unique(return_inverse=True)
        self._band, self.bands = band.to(x.device), int(band.max()) + 1
        self._size = torch.bincount(band).to(x)

    def transform(self, x: Tensor) -> Tensor:
        """F x of samples (N, ...)."""
        return self._along(x, 0)

    def inverse(self, x: Tensor) -> Tensor:
        """The samples F^T x (N, ...)."""
        return self._along(x, 1)

    def means(self, values: Tensor) -> Tensor:
        """The means (N, bands) of values (N, ...) over each band."""
        sums = values.new_zeros(len(values), self.bands).index_add_(1, self._band, values.flatten(1))
        return sums / self._size

    def spread(self, values: Tensor) -> Tensor:
        """The values (N, ...) of all cosines from those of their bands (N, bands)."""
        return values[:, self._band].view(-1, *self._shape)

    def _along(self, x: Tensor, axis: int) -> Tensor:
        for i, matrix in enumerate(self._matrices, 1):
            x = torch.tensordot(x, matrix, dims=([i], [1 - axis])).movedim(-1, i)
        return x


def _transform(n: int) -> Tensor:
    """The orthonormal discrete cosine transform of n values, (frequencies, n), float64."""
    k = torch.arange(n, dtype=torch.float64, device="cpu")
    matrix = torch.cos(math.pi / n * k[:, None] * (k + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def _frequency(shape: Sequence[int]) -> Tensor:
    """The frequency of each cosine, in units of the lowest one; the first of several axes, the channels, has none."""
    axes = range(len(shape))[-max(1, len(shape) - 1) :]
    longest = max(shape[i] for i in axes)
    square = torch.zeros(*shape, dtype=torch.float64, device="cpu")
    for i in axes:
        k = torch.arange(shape[i], dtype=torch.float64, device="cpu") * (longest / shape[i])
        square = square + k.square().view([-1 if j == i else 1 for j in range(len(shape))])
    return square.sqrt()
