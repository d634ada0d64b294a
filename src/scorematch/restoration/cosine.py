r"""An estimate of the covariance of data that is diagonal in cosines, and is learned while a sampler runs.

The covariance of :math:`x_0` given :math:`x` at the level :math:`\sigma` is :math:`\sigma^2 J`, with the Jacobian J of
the denoised image. Here it is approximated by :math:`F^\top \operatorname{diag}(c)\, F`, where F is the orthonormal
discrete cosine transform along all axes of a sample, and c has one value for each band of frequencies. Statistics of
natural images and signals depend little on the position, and F nearly diagonalizes their covariance. Before anything is
known, c belongs to the spectrum :math:`1 / (f^2 + f_0^2)` of natural images, where f is the frequency and :math:`f_0`
the lowest one. Each product :math:`J u` that a method computes improves it by the mean over each band,

.. math:: c = \sigma^2 \frac{\sum (F u)(F J u)}{\sum (F u)^2} .

For Gaussian data the inverse covariance at another level differs by a multiple of the identity, which gives the
estimate there: :math:`1/c' = 1/c + 1/\sigma'^2 - 1/\sigma^2`.

References:
    Rissanen et al., 2024, Free Hunch, arXiv:2410.11149 (the transfer of a covariance between noise levels).
    Field, 1987, Relations between the statistics of natural images and the response properties of cortical cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_BANDS = 4  # per doubling of the frequency
_LEAST, _MOST = 1e-6, 1 - 1e-4  # of the variance along a cosine, relative to that of the noise of the level


class CosineCovariance:
    """The estimate for each sample of a batch, independent of the other samples.

    Args:
        x: the batch (N, ...), for its shape, dtype and device.
        variance: the mean variance of the values of the data.
    """

    def __init__(self, x: Tensor, variance: float) -> None:
        self._shape = x.shape[1:]
        self._transforms = [_transform(n).to(x) for n in self._shape]
        frequency = _frequency(self._shape)
        band = (_BANDS * (1 + frequency).log2()).round().long()
        if len(self._shape) > 1:  # the first axis has the channels, each cosine of which has bands of its own
            band = band + (1 + band.max()) * torch.arange(self._shape[0], device="cpu").view(
                -1, *[1] * (len(self._shape) - 1)
            )
        _, band = band.flatten().unique(return_inverse=True)
        self._band, self._bands = band.to(x.device), int(band.max()) + 1
        self._size = torch.bincount(band).to(x)
        spectrum = 1 / (1 + frequency.square())
        self._values = self._means((spectrum / spectrum.mean() * variance).to(x)[None])  # c, (N, bands)
        self._level: Any = math.inf  # of the noise, for which this is c

    def at(self, level: Any) -> None:
        """Moves the estimate to the level sigma whose square is ``level``, a float or a tensor ()."""
        self._values = 1 / (1 / self._values + 1 / level - 1 / self._level)
        self._level = level

    def transfer(self, d: Tensor, level: Any) -> Tensor:
        """Moves the estimate to a level, and with it D - m, which is C / sigma^2 times x - m for Gaussian data."""
        before = self._values / self._level
        self.at(level)
        factor = (self._values / level / before)[:, self._band].view(-1, *self._shape)
        return self._along(factor * self._along(d, 0), 1)

    def product(self, x: Tensor) -> Tensor:
        """The product of samples (N, ...) with the covariance."""
        values = self._values[:, self._band].view(-1, *self._shape)
        return self._along(values * self._along(x, 0), 1)

    def learn(self, u: Tensor, product: Tensor) -> None:
        """Improves the estimate by a product J u at the present level; samples whose u is zero keep theirs."""
        a, b = self._along(u, 0), self._along(product, 0)
        squares, along = self._means(a.square()), self._means(a * b)
        # The estimate before counts as one vector with the mean square of u in every band.
        weights = (squares / squares.mean(1, keepdim=True)).nan_to_num(0.0)
        found = (along / squares).nan_to_num(0.0).clamp(_LEAST, _MOST) * self._level
        self._values = torch.lerp(self._values.expand_as(found), found, weights / (1 + weights))

    def _along(self, x: Tensor, axis: int) -> Tensor:
        """F x for the axis 0 of the matrices, and F^T x for the axis 1."""
        for i, matrix in enumerate(self._transforms, 1):
            x = torch.tensordot(x, matrix, dims=([i], [1 - axis])).movedim(-1, i)
        return x

    def _means(self, values: Tensor) -> Tensor:
        """The means (N, bands) of values (N, ...) over each band."""
        sums = values.new_zeros(len(values), self._bands).index_add_(1, self._band, values.flatten(1))
        return sums / self._size


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
