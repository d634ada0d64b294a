r"""How each family's network becomes a score: one formula, a row of coefficients per family.

.. math:: \nabla_x \log p_\sigma(x) \approx c_{skip}\, u + c_{out}\, F(c_{in}\, u, c_{noise})

F is the backbone, u the image in the units it was trained in. ``x`` is in the package's own units, images in [0, 1],
and so is the score. For a backbone that lives in [-1, 1], k is the ratio of the units (u = k (x - middle), k = 2 for
images in [0, 1]) and s = k sigma; sigma_d = 1/2 is the standard deviation of image data there, and v = s^2 + sigma_d^2.

========  ==========  ===========  =======================  ========  ======================
row       u           c_in         c_out                    c_skip    c_noise
========  ==========  ===========  =======================  ========  ======================
ncsn      x           1            1                        0         position in the ladder
ncsnv2    x           1            1 / sigma                0         sigma
karras    in [-1, 1]  1 / sqrt(v)  k sigma_d / (s sqrt(v))  -k / v    log(s) / 4
========  ==========  ===========  =======================  ========  ======================

The rows "ncsn" and "ncsnv2" leave the image as it is: their networks center it themselves. With "karras" a network that
answers zero is the exact score of Gaussian data of deviation sigma_d around the middle of the range, and the network's
input and target have unit variance at every noise level.

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011 (1 / sigma).
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_SIGMA_DATA = 0.5


class Coefficients(NamedTuple):
    """The row of one family at given noise levels; each entry has sigma's shape or is a number."""

    c_in: Tensor | float
    c_skip: Tensor | float
    c_out: Tensor | float
    c_noise: Tensor


class Row(NamedTuple):
    """One row of the table.

    ``coefficients(sigma, position, k)`` takes noise levels in x's units, the function that finds their position in the
    ladder, and k. ``centered`` says whether u is x mapped from the network's value range to [-1, 1].
    """

    coefficients: Callable[[Tensor, Callable[[Tensor], Tensor], float], Coefficients]
    centered: bool


def _ncsn(sigma: Tensor, position: Callable[[Tensor], Tensor], k: float) -> Coefficients:
    return Coefficients(1.0, 0.0, 1.0, position(sigma))


def _ncsnv2(sigma: Tensor, position: Callable[[Tensor], Tensor], k: float) -> Coefficients:
    return Coefficients(1.0, 0.0, 1 / sigma, sigma)


def _karras(sigma: Tensor, position: Callable[[Tensor], Tensor], k: float) -> Coefficients:
    s = k * sigma
    variance = s.square() + _SIGMA_DATA**2
    return Coefficients(
        c_in=variance.rsqrt(),
        c_skip=-k / variance,
        c_out=k * _SIGMA_DATA * variance.rsqrt() / s,
        c_noise=torch.log(s) / 4,
    )


ROWS: dict[str, Row] = {
    "ncsn": Row(_ncsn, centered=False),
    "ncsnv2": Row(_ncsnv2, centered=False),
    "karras": Row(_karras, centered=True),
}
