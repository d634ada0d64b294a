r"""The preconditioning table: how the output of a network becomes a score. One formula, with a row for each family.

.. math:: \nabla_x \log p_\sigma(x) \approx c_{skip}\, u + c_{out}\, F(c_{in}\, u, c_{noise})

F is the backbone, and u the image in the units that the backbone was trained in. ``x`` and the score are in the units
of the package, images in [0, 1]. For a backbone of images in [-1, 1], k is the ratio of the units (u = k (x - middle),
k = 2 for images in [0, 1]) and s = k sigma; sigma_d = 1/2 is the standard deviation of image data in [-1, 1], and
v = s^2 + sigma_d^2.

=======  ==========  ===============  =======================  ============  ===========================
row      u           c_in             c_out                    c_skip        c_noise
=======  ==========  ===============  =======================  ============  ===========================
ncsn     x           1                1                        0             position in the schedule
ncsnv2   x           1                1 / sigma                0             sigma
ncsnpp   x           1                1 / sigma                0             log(sigma)
ddpm     in [-1, 1]  1 / sqrt(1+s^2)  -k / s                   0             time step
ddpm_v   in [-1, 1]  1 / sqrt(1+s^2)  -k / (s sqrt(1+s^2))     -k / (1+s^2)  time step
ddpm_x0  in [-1, 1]  1 / sqrt(1+s^2)  k / s^2                  -k / s^2      time step
karras   in [-1, 1]  1 / sqrt(v)      k sigma_d / (s sqrt(v))  -k / v        log(s) / 4
=======  ==========  ===============  =======================  ============  ===========================

The time step of a DDPM is the number of levels minus one minus the position in the schedule: 0 is the lowest level.
Between two steps it is fractional. A DDPM takes images scaled to unit variance of signal and noise together, and
predicts the noise, v, or the clean image. An image that is given as a condition is converted to the units of u, without
noise and without c_in. The rows of NCSN's line take the image as it is: NCSN and NCSNv2 center it themselves. With
"karras" a backbone that outputs zero is the exact score of Gaussian data of deviation sigma_d around the middle of the
range, and the backbone's input and target have unit variance at every noise level.

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011 (1 / sigma).
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456 (NCSN++).
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    Salimans & Ho, 2022, Progressive Distillation, arXiv:2202.00512, App. D (v).
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scorematch.noise import NoiseSchedule
from scorematch.protocol import check_score, per_image

_SIGMA_DATA = 0.5


class Coefficients(NamedTuple):
    """The coefficients of the formula at given noise levels; each has the shape of sigma or is a number."""

    c_in: Tensor | float
    c_skip: Tensor | float
    c_out: Tensor | float
    c_noise: Tensor


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        coefficients: called with noise levels in the units of x, the network's schedule, and k.
        centered: whether u is x mapped from the network's value range to [-1, 1].
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
    """s, c_in and the time step, which the rows of DDPMs share."""
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


@dataclass(frozen=True)
class Preconditioning:
    """The row of one network, with the values that its coefficients depend on.

    Args:
        row: the name of the row.
        schedule: the noise levels that the backbone was trained on.
        value_range: (low, high) of the data, or None for data without a range.
        predicts_variance: whether the backbone returns twice the channels of x. The second half is a variance, which
            the score does not use (Nichol & Dhariwal, 2021, arXiv:2102.09672).
    """

    row: str
    schedule: NoiseSchedule
    value_range: tuple[float, float] | None
    predicts_variance: bool = False

    @property
    def units(self) -> tuple[float, float]:
        """The k and the middle of u = k (x - middle)."""
        if self.value_range is None or not ROWS[self.row].centered:
            return 1.0, 0.0
        low, high = self.value_range
        return 2 / (high - low), (low + high) / 2

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels () or (N,)."""
        return ROWS[self.row].coefficients(sigma, self.schedule, self.units[0])

    def score(self, backbone: nn.Module, x: Tensor, coefficients: Coefficients, condition: Tensor | None) -> Tensor:
        """The score by the formula above, in float32 at least. Inside the backbone its own dtype is used."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        c_in, c_skip, c_out, c_noise = coefficients
        k, middle = self.units
        u = k * (x.to(dtype) - middle)
        parameter = next(backbone.parameters(), None)
        inner = dtype if parameter is None else parameter.dtype
        arguments = [
            (per_image(c_in, x) * u).to(inner),
            c_noise.to(torch.promote_types(inner, torch.float32)).expand(len(x)),
        ]
        if condition is not None:
            if condition.ndim == 4 and condition.is_floating_point():
                condition = (k * (condition.to(dtype) - middle)).to(inner)
            arguments.append(condition)
        output = self._prediction(backbone(*arguments), x)
        return (per_image(c_skip, x) * u + per_image(c_out, x) * output.to(dtype)).to(x.dtype)

    def _prediction(self, output: Any, x: Tensor) -> Tensor:
        """The output of a backbone, without its variance, after a check of its shape."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the backbone must return a tensor of the shape of x, got {type(output).__name__}. For a UNet2DModel "
                "of diffusers use ScoreNet.from_diffusers(unet, scheduler)."
            )
        twice = output.shape == (len(x), 2 * x.shape[1], *x.shape[2:])
        if twice and self.predicts_variance:
            return output[:, : x.shape[1]]
        if twice or self.predicts_variance:
            hint = "Pass predicts_variance=True if the second half is a variance."
            if self.predicts_variance:
                hint = "With predicts_variance=True it must return twice the channels of x."
            raise ValueError(
                f"the backbone returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}. {hint}"
            )
        return check_score(output, x)
