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
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scorematch.core.cosines import Cosines

_LEAST, _MOST = 1e-6, 1 - 1e-4  # of the variance along a cosine, relative to that of the noise of the level


class CosineCovariance:
    """The estimate for each sample of a batch, independent of the other samples.

    Args:
        x: the batch (N, ...), for its shape, dtype and device.
        variance: the mean variance of the values of the data.
    """

    def __init__(self, x: Tensor, variance: float) -> None:
        self._cosines = Cosines(x)
        spectrum = 1 / (1 + self._cosines.frequency.square())
        # c, (N, bands)
        self._values = self._cosines.means((spectrum / spectrum.mean() * variance).to(x)[None])
        self._level: Any = math.inf  # of the noise, for which this is c

    def at(self, level: Any) -> None:
        """Moves the estimate to the level sigma whose square is ``level``, a float or a tensor ()."""
        self._values = 1 / (1 / self._values + 1 / level - 1 / self._level)
        self._level = level

    def product(self, x: Tensor) -> Tensor:
        """The product of samples (N, ...) with the covariance C."""
        return self._scaled(x, self._values)

    def damped(self, x: Tensor, damping: Tensor) -> Tensor:
        """The product with C (C + d I)^-1, for a number d of each sample, (N,)."""
        return self._scaled(x, self._values / (self._values + damping[:, None]))

    def learn(self, u: Tensor, product: Tensor) -> None:
        """Improves the estimate by a product J u at the present level; samples whose u is zero keep theirs."""
        a, b = self._cosines.transform(u), self._cosines.transform(product)
        squares, along = self._cosines.means(a.square()), self._cosines.means(a * b)
        # The estimate before counts as one vector with the mean square of u in every band.
        weights = (squares / squares.mean(1, keepdim=True)).nan_to_num(0.0)
        found = (along / squares).nan_to_num(0.0).clamp(_LEAST, _MOST) * self._level
        self._values = torch.lerp(self._values.expand_as(found), found, weights / (1 + weights))

    def _scaled(self, x: Tensor, factors: Tensor) -> Tensor:
        """Samples (N, ...) whose cosines are multiplied by the factors of their bands (N, bands)."""
        return self._cosines.inverse(self._cosines.spread(factors) * self._cosines.transform(x))
