r"""How each family's network becomes a score: one formula, a row of coefficients per family.

.. math:: \nabla_x \log p_\sigma(x) \approx c_{skip}\, u + c_{out}\, F(c_{in}\, u, c_{noise})

F is the backbone, u the image in the units it was trained in. ``x`` is in the package's own units, images in [0, 1],
and so is the score. For a backbone that lives in [-1, 1], k is the ratio of the units (u = k (x - middle), k = 2 for
images in [0, 1]) and s = k sigma; sigma_d = 1/2 is the standard deviation of image data there, and v = s^2 + sigma_d^2.

=======  ==========  ===============  =======================  ============  ===========================
row      u           c_in             c_out                    c_skip        c_noise
=======  ==========  ===============  =======================  ============  ===========================
ncsn     x           1                1                        0             position in the ladder
ncsnv2   x           1                1 / sigma                0             sigma
ncsnpp   x           1                1 / sigma                0             log(sigma)
ddpm     in [-1, 1]  1 / sqrt(1+s^2)  -k / s                   0             the ladder's end - position
ddpm_v   in [-1, 1]  1 / sqrt(1+s^2)  -k / (s sqrt(1+s^2))     -k / (1+s^2)  likewise
ddpm_x0  in [-1, 1]  1 / sqrt(1+s^2)  k / s^2                  -k / s^2      likewise
karras   in [-1, 1]  1 / sqrt(v)      k sigma_d / (s sqrt(v))  -k / v        log(s) / 4
=======  ==========  ===============  =======================  ============  ===========================

A DDPM knows time steps, the quietest being 0, and images scaled down so that signal and noise have variance one
together; it answers with the noise, with v, or with the clean image. Between two time steps it is asked for a
fractional one.
An image that is given as a condition is brought into the units of u, without noise and without c_in.
The rows of NCSN's line leave the image as it is: NCSN and NCSNv2 center it themselves. With "karras" a network that
answers zero is the exact score of Gaussian data of deviation sigma_d around the middle of the range, and the network's
input and target have unit variance at every noise level.

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011 (1 / sigma).
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456 (NCSN++).
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    Salimans & Ho, 2022, Progressive Distillation, arXiv:2202.00512, App. D (v).
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule

_SIGMA_DATA = 0.5


class Coefficients(NamedTuple):
    """The row of one family at given noise levels; each entry has sigma's shape or is a number."""

    c_in: Tensor | float
    c_skip: Tensor | float
    c_out: Tensor | float
    c_noise: Tensor


class Row(NamedTuple):
    """One row of the table.

    ``coefficients(sigma, schedule, k)`` takes noise levels in x's units, the network's ladder, and k. ``centered`` says
    whether u is x mapped from the network's value range to [-1, 1].
    """

    coefficients: Callable[[Tensor, NoiseSchedule, float], Coefficients]
    centered: bool


def _ncsn(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
    return Coefficients(1.0, 0.0, 1.0, schedule.position(sigma))


def _ncsnv2(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
    return Coefficients(1.0, 0.0, 1 / sigma, sigma)


def _ncsnpp(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
    return Coefficients(1.0, 0.0, 1 / sigma, torch.log(sigma))


def _ddpm_input(sigma: Tensor, schedule: NoiseSchedule, k: float) -> tuple[Tensor, Tensor, Tensor]:
    """s, c_in and the time step."""
    s = k * sigma
    return s, (1 + s.square()).rsqrt(), len(schedule) - 1 - schedule.position(sigma)


def _ddpm(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
    s, c_in, step = _ddpm_input(sigma, schedule, k)
    return Coefficients(c_in, 0.0, -k / s, step)


def _ddpm_v(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
    s, c_in, step = _ddpm_input(sigma, schedule, k)
    return Coefficients(c_in, -k * c_in.square(), -k * c_in / s, step)


def _ddpm_x0(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
    s, c_in, step = _ddpm_input(sigma, schedule, k)
    return Coefficients(c_in, -k / s.square(), k / s.square(), step)


def _karras(sigma: Tensor, schedule: NoiseSchedule, k: float) -> Coefficients:
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
    "ncsnpp": Row(_ncsnpp, centered=False),
    "ddpm": Row(_ddpm, centered=True),
    "ddpm_v": Row(_ddpm_v, centered=True),
    "ddpm_x0": Row(_ddpm_x0, centered=True),
    "karras": Row(_karras, centered=True),
}
