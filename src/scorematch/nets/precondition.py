r"""The preconditioning: one formula that computes the score from the output of a network, with a table of coefficients.

.. math:: \nabla_x \log p_\sigma(x) \approx c_{skip}\, u + c_{out}\, F(c_{in}\, u, c_{noise})

F is the backbone, and u the noisy image in the units that the backbone was trained in. x, sigma and the score are in
the units of images in [0, 1]. For a backbone that was trained on images in [-1, 1], u = k (x - middle), where k is the
ratio of the units, 2 for images in [0, 1], and middle is the middle of the network's value range. In the table
s = k sigma is the noise level in these units, sigma_d the standard deviation of the data in [-1, 1], and
v = s^2 + sigma_d^2. Each row has a name, the argument ``precondition`` of ScoreNet.

============  ==========  =================  =======================  ============  ===========================
row           u           c_in               c_out                    c_skip        c_noise
============  ==========  =================  =======================  ============  ===========================
ncsn          x           1                  1                        0             position in the schedule
ncsnv2        x           1                  1 / sigma                0             sigma
ncsnpp        x           1                  1 / sigma                0             log(sigma)
ncsnpp_index  x           1                  1 / sigma                0             position in the schedule
ddpm          in [-1, 1]  1 / sqrt(1+s^2)    -k / s                   0             time step
ddpm_v        in [-1, 1]  1 / sqrt(1+s^2)    -k / (s sqrt(1+s^2))     -k / (1+s^2)  time step
ddpm_x0       in [-1, 1]  1 / sqrt(1+s^2)    k / s^2                  -k / s^2      time step
vp            in [-1, 1]  1 / sqrt(1+s^2)    -k / s                   0             time_scale t
subvp         in [-1, 1]  2/(s+sqrt(4+s^2))  -k / s                   0             time_scale t
karras        in [-1, 1]  1 / sqrt(v)        k sigma_d / (s sqrt(v))  -k / v        log(s) / 4
flow          in [-1, 1]  1 / (1 + s)        -k / (s (1 + s))         -k/(s(1+s))   time_scale s / (1 + s)
flow_reverse  in [-1, 1]  1 / (1 + s)        k / (s (1 + s))          -k/(s(1+s))   time_scale / (1 + s)
============  ==========  =================  =======================  ============  ===========================

The position of a noise level in the schedule is its index, 0 for the highest level (``NoiseSchedule.position``). The
time step of a DDPM is the number of levels minus one minus the position: 0 is the lowest level. Between two levels both
are fractional. The input of a DDPM is scaled to a total variance of one, and the backbone predicts the noise ("ddpm"),
v ("ddpm_v") or the clean image ("ddpm_x0"). An image as a condition is converted to the units of u, without c_in. The
backbones of the rows "ncsn" to "ncsnpp_index" receive images in [0, 1]; NCSN, NCSNv2 and NCSN++ map them to [-1, 1]
themselves. With "karras" the backbone's input and target have unit variance at every noise level, and a backbone that
returns zero gives the exact score of Gaussian data around the middle of the range with standard deviation sigma_d.

"vp" and "subvp" are the variance preserving diffusions of Song et al. (2021) in continuous time t, from 0 to 1. At time
t the image is scaled by alpha, and the noise has the standard deviation sqrt(1 - alpha^2) for VP and 1 - alpha^2 for
sub-VP, with

.. math:: q = -2 \log \alpha = \beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2.

s is this standard deviation divided by alpha. Therefore :math:`q = \log(1 + s^2)` for VP and
:math:`q = 2 \operatorname{arsinh}(s / 2)` for sub-VP. The time of a noise level is

.. math:: t = \frac{2 q}{\beta_{min} + \sqrt{\beta_{min}^2 + 2 (\beta_{max} - \beta_{min}) q}},

a form of the root of the quadratic equation that is accurate at low noise levels.

"flow" is flow matching along straight lines, :math:`x_t = (1 - t)\, x_0 + t\, n` with standard normal n, so that
:math:`s = t / (1 - t)`; the backbone predicts the velocity :math:`n - x_0` at the time t. "flow_reverse" has the
opposite direction of time, in which noise is at 0, data at 1, and the velocity is :math:`x_0 - n`, as in torchcfm.

Data that are not images have a mean and a standard deviation for each channel (``Units``) in place of a range. Then
u = k (x - mean) with k = 1 / (2 std), so that u has the standard deviation 0.5 like images in [-1, 1]. The noise of a
channel is sigma times the ratio r of its std to the geometric mean of all std. Then s is the same in all channels, and
the row gives the score of x / r. The units of older networks have noise of sigma in all channels: there k, s and the
coefficients but c_noise have a value for each channel, and c_noise is computed from the geometric mean of k.

A row also carries what depends on it elsewhere (``Row``): the levels and the weights of its training, and the settings
of its sampler.

Some rows have options with default values: "karras" has sigma_data = 0.5 (sigma_d above), and "vp" and "subvp" have
beta_min = 0.1, beta_max = 20 and time_scale = 999. "flow" and "flow_reverse" have time_scale = 1.

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011 (1 / sigma).
    Song et al., 2021, Score-Based Generative Modeling through SDEs, arXiv:2011.13456 (NCSN++).
    Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
    Salimans & Ho, 2022, Progressive Distillation, arXiv:2202.00512, App. D (v).
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 1.
    Lipman et al., 2023, Flow Matching for Generative Modeling, arXiv:2210.02747; Liu et al., 2023, arXiv:2209.03003.
    Esser et al., 2024, Scaling Rectified Flow Transformers, arXiv:2403.03206 (the levels of "flow" in training).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scorematch.core.batches import per_image
from scorematch.core.conditions import Parts
from scorematch.core.messages import few
from scorematch.core.schema import Field, check
from scorematch.core.scores import check_score
from scorematch.noise import NoiseSchedule

__all__ = ["ROWS", "Coefficients", "Preconditioning", "Row", "Units"]


class Units(NamedTuple):
    """The mean and the standard deviation of each channel of data that are not images.

    Attributes:
        mean: one number for each channel.
        std: one positive number for each channel.
        relative: whether the noise of a channel is sigma r, with the ratio r of its std to the geometric mean of all
            std; otherwise it is sigma in all channels.
        image: the units of a conditioning image, if they are known; those of x are used otherwise.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    relative: bool = False
    image: Units | None = None

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Units:
        """The units of ``to_dict``."""
        image = stored.get("image")
        return cls(**{**stored, "image": None if image is None else cls.from_dict(image)})

    def __str__(self) -> str:
        """The first channels, such as "mean 250, -3; deviation 30, 0.5"."""
        parts = {
            "mean": self.mean,
            "deviation": self.std,
            **({"noise sigma times": self.ratios} if self.relative else {}),
        }
        return "; ".join(f"{name} {few((f'{value:.4g}' for value in part), 6)}" for name, part in parts.items())

    @property
    def typical(self) -> float:
        """The geometric mean of the standard deviations."""
        largest = max(self.std)  # factored out, so that equal ones are their mean without rounding
        return largest * math.exp(sum(math.log(std / largest) for std in self.std) / len(self.std))

    @property
    def ratios(self) -> tuple[float, ...]:
        """The standard deviation r of the noise of each channel, relative to sigma."""
        typical = self.typical
        return tuple(std / typical for std in self.std) if self.relative else (1.0,) * len(self.std)

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make these units, as they are stored."""
        found: dict[str, Any] = {"mean": list(self.mean), "std": list(self.std)}
        found |= {"relative": True} if self.relative else {}
        return found if self.image is None else {**found, "image": self.image.to_dict()}

    def isotropic(self) -> Units:
        """The units of x / r, whose noise is sigma in all channels."""
        mean, std = (tuple(a / r for a, r in zip(part, self.ratios, strict=True)) for part in (self.mean, self.std))
        return Units(mean, std)

    def noise(self, like: Tensor) -> Tensor:
        """The numbers r (1, C), in the same way as ``scale``."""
        return like.new_tensor([self.ratios], dtype=torch.promote_types(like.dtype, torch.float32))

    def scale(self, like: Tensor) -> Tensor:
        """The numbers 1 / (2 std), (1, C), with the dtype and the device of a tensor, at least float32."""
        return 1 / (2 * like.new_tensor([self.std], dtype=torch.promote_types(like.dtype, torch.float32)))

    def center(self, like: Tensor) -> Tensor:
        """The mean (1, C), in the same way."""
        return like.new_tensor([self.mean], dtype=torch.promote_types(like.dtype, torch.float32))


Scale = float | Tensor  # k, for all channels or (1, C)


class Coefficients(NamedTuple):
    """The coefficients of the formula at given noise levels.

    Attributes:
        c_in: the factor of the input, a tensor of sigma's shape, (N, C) or a number, and so are ``c_skip`` and
            ``c_out``.
        c_skip: the factor of u in the score.
        c_out: the factor of the backbone's output in the score.
        c_noise: the second argument of the backbone, a tensor of sigma's shape.
    """

    c_in: Tensor | float
    c_skip: Tensor | float
    c_out: Tensor | float
    c_noise: Tensor


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        coefficients: a function of sigma in the units of x, the network's schedule, k, and the options as keywords.
        centered: whether u is x mapped from the network's value range to [-1, 1]; otherwise u is x.
        options: the default value of each option, a positive number, by name.
        log_levels: the mean and the standard deviation of log s in training, if log s is normally distributed and the
            data have the default standard deviation sigma_d; None trains on the levels of the schedule.
        weighting: the weights of the noise levels in training (``scorematch.training.levels``).
        power: the exponent p of consistent sampling without settings (``AnnealedLangevinSampler``).
        diffusers: the embedding of the noise level with which a U-Net of diffusers has this c_noise and this meaning of
            its output; None if there is none.
        discrete: whether the backbone takes the number of one of few noise levels, and knows no levels between them.
    """

    coefficients: Callable[..., Coefficients]
    centered: bool
    options: Mapping[str, float] = {}
    log_levels: tuple[float, float] | None = None
    weighting: Literal["sigma", "backbone"] = "backbone"
    power: float = 1.1
    diffusers: Literal["positional", "fourier"] | None = None
    discrete: bool = False


def _ncsn(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    return Coefficients(1.0, 0.0, 1.0, schedule.position(sigma))


def _ncsnv2(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    return Coefficients(1.0, 0.0, 1 / sigma, sigma)


def _ncsnpp(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    return Coefficients(1.0, 0.0, 1 / sigma, torch.log(sigma))


def _ncsnpp_index(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    return Coefficients(1.0, 0.0, 1 / sigma, schedule.position(sigma))


def _ddpm_input(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> tuple[Tensor, Tensor, Tensor]:
    """s, c_in and the time step of the rows "ddpm", "ddpm_v" and "ddpm_x0"."""
    s = k * sigma
    return s, (1 + s.square()).rsqrt(), len(schedule) - 1 - schedule.position(sigma)


def _ddpm(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    s, c_in, step = _ddpm_input(sigma, schedule, k)
    return Coefficients(c_in, 0.0, -k / s, step)


def _ddpm_v(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    s, c_in, step = _ddpm_input(sigma, schedule, k)
    return Coefficients(c_in, -k * c_in.square(), -k * c_in / s, step)


def _ddpm_x0(sigma: Tensor, schedule: NoiseSchedule, k: Scale) -> Coefficients:
    s, c_in, step = _ddpm_input(sigma, schedule, k)
    return Coefficients(c_in, -k / s.square(), k / s.square(), step)


def _time(q: Tensor, *, beta_min: float, beta_max: float, time_scale: float) -> Tensor:
    """The time t at which -2 log(alpha) = q, times ``time_scale``."""
    return time_scale * (2 * q / (beta_min + (beta_min**2 + 2 * (beta_max - beta_min) * q).sqrt()))


def _vp(sigma: Tensor, schedule: NoiseSchedule, k: Scale, **time: float) -> Coefficients:
    s = k * sigma
    return Coefficients((1 + s.square()).rsqrt(), 0.0, -k / s, _time(torch.log1p(s.square()), **time))


def _subvp(sigma: Tensor, schedule: NoiseSchedule, k: Scale, **time: float) -> Coefficients:
    s = k * sigma
    return Coefficients(2 / (s + (4 + s.square()).sqrt()), 0.0, -k / s, _time(2 * torch.asinh(s / 2), **time))


def _karras(sigma: Tensor, schedule: NoiseSchedule, k: Scale, *, sigma_data: float) -> Coefficients:
    s = k * sigma
    variance = s.square() + sigma_data**2
    return Coefficients(
        c_in=variance.rsqrt(),
        c_skip=-k / variance,
        c_out=k * sigma_data * variance.rsqrt() / s,
        c_noise=torch.log(s) / 4,
    )


def _flow(sigma: Tensor, schedule: NoiseSchedule, k: Scale, *, time_scale: float) -> Coefficients:
    s = k * sigma
    c_out = -k / (s * (1 + s))
    return Coefficients(1 / (1 + s), c_out, c_out, time_scale * s / (1 + s))


def _flow_reverse(sigma: Tensor, schedule: NoiseSchedule, k: Scale, *, time_scale: float) -> Coefficients:
    s = k * sigma
    c_out = k / (s * (1 + s))
    return Coefficients(1 / (1 + s), -c_out, c_out, time_scale / (1 + s))


_DIFFUSION = {"beta_min": 0.1, "beta_max": 20.0, "time_scale": 999.0}
ROWS: dict[str, Row] = {
    # The backbone predicts the score itself, and has parameters of its own for every noise level.
    "ncsn": Row(_ncsn, centered=False, weighting="sigma", discrete=True),
    "ncsnv2": Row(_ncsnv2, centered=False),
    # The step is close to the published one of variance-exploding networks, 1.5 (1 - r) sigma^2
    # (Jolicoeur-Martineau et al., 2020, arXiv:2009.05475).
    "ncsnpp": Row(_ncsnpp, centered=False, power=1.5, diffusers="fourier"),
    "ncsnpp_index": Row(_ncsnpp_index, centered=False),
    "ddpm": Row(_ddpm, centered=True, diffusers="positional"),
    "ddpm_v": Row(_ddpm_v, centered=True, diffusers="positional"),
    "ddpm_x0": Row(_ddpm_x0, centered=True, diffusers="positional"),
    "vp": Row(_vp, centered=True, options=_DIFFUSION),
    "subvp": Row(_subvp, centered=True, options=_DIFFUSION),
    # Karras et al. 2022, Table 1: the logarithm of sigma for images in [-1, 1] with a standard deviation of 0.5.
    "karras": Row(_karras, centered=True, options={"sigma_data": 0.5}, log_levels=(-1.2, 1.2)),
    # Esser et al. 2024: the logit of t is standard normal in training.
    "flow": Row(_flow, centered=True, options={"time_scale": 1.0}, log_levels=(0.0, 1.0)),
    "flow_reverse": Row(_flow_reverse, centered=True, options={"time_scale": 1.0}, log_levels=(0.0, 1.0)),
}


def check_options(row: str, options: Any, where: str) -> None:
    """Checks the options of a row.

    Args:
        row: the name of the row.
        options: the options that differ from the defaults, by name.
        where: the name of the options in messages.

    Raises:
        ValueError: if the row does not have an option, a value is not a number from 1e-6 to 1e6, or beta_max is below
            beta_min.
    """
    known = ROWS[row].options
    if options and not known:
        raise ValueError(f"{where}: the preconditioning {row!r} has no options, got {', '.join(map(repr, options))}.")
    check(options, dict.fromkeys(known, Field(float, low=1e-6, high=1e6)), where, closed=True)
    values = {**known, **options}
    if "beta_max" in values and values["beta_max"] < values["beta_min"]:
        raise ValueError(
            f"{where}: beta_max must be at least beta_min, {values['beta_min']:g}, got {values['beta_max']:g}."
        )


@dataclass(frozen=True)
class Preconditioning:
    """The preconditioning of one network: a row of the table with the values that its coefficients depend on.

    Args:
        row: the name of the row.
        schedule: the noise levels that the backbone was trained on.
        value_range: (low, high) of the data, or None for data without a range.
        predicts_variance: whether the backbone returns twice as many channels as x has. The second half predicts the
            variance of ancestral sampling (Nichol & Dhariwal, 2021, arXiv:2102.09672); the score does not use it.
        options: the options of the row that differ from the defaults, by name.
        data: the mean and the standard deviation of each channel of data that are not images; None if they are not
            known.
    """

    row: str
    schedule: NoiseSchedule
    value_range: tuple[float, float] | None
    predicts_variance: bool = False
    options: Mapping[str, float] = field(default_factory=dict, hash=False)
    data: Units | None = None

    @property
    def units(self) -> tuple[float, float]:
        """(k, middle) of u = k (x - middle); (1, 0) if u is x; (k, 0) with the mean of log k over the channels."""
        if self.data is not None:
            return math.exp(-sum(math.log(2 * std) for std in self.data.std) / len(self.data.std)), 0.0
        if self.value_range is None or not ROWS[self.row].centered:
            return 1.0, 0.0
        low, high = self.value_range
        return 2 / (high - low), (low + high) / 2

    @property
    def discrete(self) -> bool:
        """Whether the backbone was trained at the levels of the schedule alone."""
        return ROWS[self.row].discrete

    @property
    def power(self) -> float:
        """The exponent p of consistent sampling without settings."""
        return ROWS[self.row].power

    @property
    def assumed_std(self) -> float | None:
        """The standard deviation of the data that the row assumes, in the units of x; None if it assumes none."""
        if self.data is not None:
            return 0.5 / self.units[0]
        std = {**ROWS[self.row].options, **self.options}.get("sigma_data")
        return None if std is None else std / self.units[0]

    @property
    def data_std(self) -> float | None:
        """The standard deviation of the data that was given to the row, in the units of x; None if none was given."""
        return self.assumed_std if "sigma_data" in self.options or self.data is not None else None

    @property
    def log_levels(self) -> tuple[float, float] | None:
        """The mean and the standard deviation of log sigma in training; None for the levels of the schedule."""
        row = ROWS[self.row]
        if row.log_levels is None:
            return None
        mean, std = row.log_levels
        default = row.options.get("sigma_data", 1.0)
        return mean + math.log(self.options.get("sigma_data", default) / default) - math.log(self.units[0]), std

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels sigma, () or (N,), in the units of x.

        They have the shape of sigma, or are numbers. For data with a standard deviation for each of C channels and
        noise that is not relative to it, all but c_noise are (1, C) or (N, C). For relative noise they are those of
        the score of x / r (``Units``).
        """
        row = ROWS[self.row]
        options = {**row.options, **self.options}
        of_all = row.coefficients(sigma, self.schedule, self.units[0], **options)
        if self.data is None or self.data.relative:
            return of_all
        each = row.coefficients(sigma.reshape(-1, 1), self.schedule, self.data.scale(sigma), **options)
        return each._replace(c_noise=of_all.c_noise)

    def outputs(
        self,
        backbone: nn.Module,
        x: Tensor,
        coefficients: Coefficients,
        condition: Tensor | Parts | None,
        *,
        variance: bool = False,
    ) -> tuple[Tensor, ...]:
        """Computes the score by the formula of this module, and the share of the large variance if it is wanted.

        The formula is evaluated in float32, or in float64 for float64 x; the backbone computes in its own dtype.

        Args:
            backbone: the backbone F.
            x: noisy data (N, ...) in the units of the package.
            coefficients: the result of ``coefficients``.
            condition: the condition as a tensor or as a dict of tensors, or None.
            variance: whether to return the share too. The second half of the output is -1 for the small variance and 1
                for the large one; the share is 0 and 1.

        Returns:
            ``(score,)`` or ``(score, share)``, each of x's shape and dtype.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        c_in, c_skip, c_out, c_noise = coefficients
        k, middle = self._scaling(x)
        u = k * (x.to(dtype) - middle)
        inner = _real_dtype(backbone, dtype)

        def in_units(part: Tensor) -> Tensor:
            own = None if self.data is None else self.data.image
            same = self.data is None or part.shape[1:2] == x.shape[1:2] or own is not None
            if not (part.ndim == x.ndim > 2 and part.is_floating_point() and same):
                return part
            scale, center = (k, middle) if own is None else (per_image(own.scale(x), x), per_image(own.center(x), x))
            return (scale * (part.to(dtype) - center)).to(inner)

        arguments: list[Any] = [
            (per_image(c_in, x) * u).to(inner),
            c_noise.to(torch.promote_types(inner, torch.float32)).expand(x.shape[0]),
        ]
        if isinstance(condition, dict):  # vectors, and what an encoder takes, have units of their own
            arguments.append({name: in_units(part) if name == "image" else part for name, part in condition.items()})
        elif condition is not None:
            arguments.append(in_units(condition))
        output = self._checked(backbone(*arguments), x)
        channels = x.shape[1]
        score = per_image(c_skip, x) * u + per_image(c_out, x) * output[:, :channels].to(dtype)
        if self.data is not None and self.data.relative:
            score = score / per_image(self.data.noise(x), x)
        score = score.to(x.dtype)
        return (score, ((1 + output[:, channels:].to(dtype)) / 2).to(x.dtype)) if variance else (score,)

    def _scaling(self, x: Tensor) -> tuple[Any, Any]:
        """The numbers k and middle of u = k (x - middle), which broadcast to x."""
        if self.data is None:
            return self.units
        if x.shape[1] != len(self.data.std):
            raise ValueError(f"x must have {len(self.data.std)} channels, like the data, got shape {tuple(x.shape)}.")
        return per_image(self.data.scale(x), x), per_image(self.data.center(x), x)

    def _checked(self, output: Any, x: Tensor) -> Tensor:
        """A backbone's output, after a check of its shape."""
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the backbone must return a tensor of the shape of x, got {type(output).__name__}. For a UNet2DModel "
                "of diffusers use ScoreNet.from_diffusers(unet, scheduler)."
            )
        twice = output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        if twice and self.predicts_variance:
            return output
        if twice or self.predicts_variance:
            hint = "Pass predicts_variance=True if the second half is a variance."
            if self.predicts_variance:
                hint = "With predicts_variance=True it must return twice the channels of x."
            raise ValueError(
                f"the backbone returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}. {hint}"
            )
        return check_score(output, x)


def _real_dtype(backbone: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the first real parameter: Fourier neural operators have complex ones, and quantization integers."""
    for parameter in backbone.parameters():  # torch 2.5 cannot compile next() of a generator with a default
        if parameter.is_floating_point():
            return parameter.dtype
    return otherwise
