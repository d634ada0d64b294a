r"""The distribution of the noise levels in training, and the weighting of the loss by noise level.

The loss at one level is :math:`w(\sigma)\, \tfrac{1}{p} \sum_i |s(x + \sigma z, \sigma)_i + z_i / \sigma|^p`. A
distribution of levels is defined by its quantile function, which maps a number u between 0 and 1 to a noise level.

==================  ==============================================  =================================================
levels              sigma                                           used by
==================  ==============================================  =================================================
a NoiseSchedule     its levels, equally probable                    NCSN, NCSNv2, DDPM
``LogUniform``      log sigma uniform between two ends              NCSN++ (continuous)
``UniformTime``     the time of the VP diffusion uniform            DDPM++ (continuous)
``LogNormal``       log sigma normal                                EDM
``LevelMixture``    several distributions, equally probable         examples and networks of this package
==================  ==============================================  =================================================

Image i of a run gets the level at :math:`u_i = \operatorname{frac}(i / \varphi + u_0)`, where phi is the golden ratio
and u_0 depends on the seed. Consecutive numbers of this sequence are spread evenly over (0, 1). Each batch therefore
covers all levels, and its loss varies less than with independent levels.

==============  ========================  ============================================================================
weighting       w                         meaning
==============  ========================  ============================================================================
"sigma"         :math:`\sigma^p`          the error of the predicted noise, equally weighted at every level (NCSN, DDPM)
"backbone"      :math:`1 / |c_{out}|^p`   the error of the backbone's output, equally weighted at every level (EDM)
"min-snr"       below                     that of "sigma", with less weight at low levels (Hang et al.)
==============  ========================  ============================================================================

For p = 2, a score of zero has a mean loss of D/2 with "sigma", where D is the number of values in an image. With
"backbone", a backbone that returns zero has this loss if its target has unit variance.

"min-snr" is :math:`\sigma^p \min(1, 5 / r)^{p/2}`: for p = 2, the squared error of the denoised image is weighted by
min(r, 5). The ratio r of signal and noise is :math:`(2 s / \sigma)^2` for data of standard deviation s; for images 2 s
is half of the range, so that r is the ratio of Hang et al. Short trainings on color images draw better samples with it,
unless the weights have fixed norms; those on digits draw worse ones (docs/recipes.md).

References:
    Song & Ermon, 2019, arXiv:1907.05600, Eq. 6. Song et al., 2021, arXiv:2011.13456, App. C.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 1.
    Hang et al., 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv:2303.09556, Section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scorematch.core.messages import quote
from scorematch.core.randomness import seed_of
from scorematch.core.scores import variance_of
from scorematch.nets.precondition import ROWS
from scorematch.noise import NoiseSchedule
from scorematch.score import ScoreNet

__all__ = ["LevelMixture", "Levels", "LogNormal", "LogUniform", "UniformTime", "levels_for", "weighting_for"]

Weighting = Literal["sigma", "backbone", "min-snr"]

_LARGEST_RATIO = 5.0  # gamma of Hang et al.
_POOLED = 2**14  # the number of levels with which a mixture represents each of its parts


@runtime_checkable
class Levels(Protocol):
    """A distribution of noise levels."""

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile function: the noise levels below which a fraction u of all levels lies.

        Args:
            u: float64 (n,), between 0 and 1.

        Returns:
            The noise levels (n,), positive, in the units of x.
        """


@dataclass(frozen=True)
class LogNormal:
    """Levels whose logarithm is normally distributed.

    Args:
        mean: the mean of log sigma, with sigma in the units of x. EDM's -1.2 is for images in [-1, 1], which is
            -1.2 - log 2 for images in [0, 1].
        std: the standard deviation of log sigma, positive.

    Example:
        >>> LogNormal(0, 1).quantile(torch.tensor([0.5], dtype=torch.float64))
        tensor([1.], dtype=torch.float64)
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean must be finite, and std finite and positive, got mean={self.mean!r} and std={self.std!r}."
            )

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u."""
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform:
    """Levels whose logarithm is uniform.

    Args:
        low: the lowest level, positive, in the units of x.
        high: the highest level, above ``low``.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf):
            raise ValueError(f"low and high must satisfy 0 < low < high, got low={self.low!r} and high={self.high!r}.")

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u."""
        return self.low * (self.high / self.low) ** u


@dataclass(frozen=True)
class UniformTime:
    r"""The levels of the variance preserving (VP) diffusion of Song et al. (2021) at uniform times t.

    In the units of images in [0, 1],

    .. math:: \sigma(t) = \tfrac12 \sqrt{e^q - 1}, \qquad
              q = \beta_{min} t + (\beta_{max} - \beta_{min}) t^2 / 2 .

    Args:
        first: the earliest time, above 0 and below 1; the last is 1. The authors train from 1e-5 on.
        beta_min: the rate of the diffusion at time 0, positive.
        beta_max: the rate at time 1, at least ``beta_min``.

    Example:
        >>> UniformTime().quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
        tensor([5.0025e-04, 7.6083e+01], dtype=torch.float64)
    """

    first: float = 1e-5
    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.first < 1:
            raise ValueError(f"first must be above 0 and below 1, got {self.first!r}.")
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"beta_min and beta_max must satisfy 0 < beta_min <= beta_max, got beta_min={self.beta_min!r} and "
                f"beta_max={self.beta_max!r}."
            )

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u."""
        t = self.first + u * (1 - self.first)
        return (self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2).expm1().sqrt() / 2


@dataclass(frozen=True)
class ScheduleLevels:
    """The levels of a schedule, equally probable.

    Args:
        schedule: the schedule.
    """

    schedule: NoiseSchedule

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u, from the lowest of the schedule to the highest."""
        return _quantiles(self.schedule.sigmas.flip(0).to(u.device), u)


@dataclass(frozen=True)
class LevelMixture:
    """Levels of several distributions, which are equally probable.

    For example, half of the levels from ``LogNormal`` concentrate the training on the levels from which a network
    learns most, and the other half from a schedule covers all levels that annealed Langevin dynamics visits.

    Args:
        parts: the distributions. A NoiseSchedule stands for its levels, equally probable.

    Example:
        >>> half = LevelMixture((NoiseSchedule([3.0, 2.0]), NoiseSchedule([1.0])))
        >>> half.quantile(torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64))
        tensor([1., 1., 2., 3.], dtype=torch.float64)
    """

    parts: tuple[Levels | NoiseSchedule, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("parts must have at least one distribution of noise levels, got none.")
        object.__setattr__(self, "parts", tuple(_distribution(part) for part in self.parts))

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u, with a resolution of 1 / 16384 in u for each part."""
        return _quantiles(self._pool, u)

    @cached_property
    def _pool(self) -> Tensor:
        """Equally probable levels of all parts, ascending."""
        u = (torch.arange(_POOLED, dtype=torch.float64, device="cpu") + 0.5) / _POOLED
        return torch.cat([_distribution(part).quantile(u) for part in self.parts]).sort().values


def _quantiles(levels: Tensor, u: Tensor) -> Tensor:
    """The quantiles at u of equally probable levels, which are ascending."""
    return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]


def levels_for(net: ScoreNet, levels: Levels | NoiseSchedule | None) -> Levels:
    """Converts the argument ``levels`` of ``train`` to a distribution.

    Args:
        net: the network to train.
        levels: a distribution or a NoiseSchedule. None is the log-normal distribution of the preconditioning, such as
            EDM's for "karras", and the network's own schedule for one without. For signals, fields and volumes in their
            own units a quarter of the levels is log-uniform between 0.02 and 200 standard deviations.
    """
    if levels is not None:
        return _distribution(levels)
    normal = net.preconditioning.log_levels
    if normal is None:
        return ScheduleLevels(net.schedule)
    # The largest mode of a field may have many deviations of a value: 13 of a field of 32 x 32 with the spectrum k^-4,
    # 44 of such a volume. Only noise above it hides it, and 1 in 200 of EDM's levels is above 13 deviations.
    most = LogNormal(*normal)
    if net.units is None or len(net.sample_shape or ()) < 2:
        return most
    return LevelMixture((most, most, most, LogUniform(0.02 * net.units.typical, 200 * net.units.typical)))


def _distribution(levels: Levels | NoiseSchedule) -> Levels:
    if isinstance(levels, NoiseSchedule):
        return ScheduleLevels(levels)
    if not isinstance(levels, Levels) or isinstance(levels, type | Tensor):  # a tensor has another method quantile
        raise TypeError(
            "levels must be a NoiseSchedule or a distribution with a method quantile, such as LogNormal(-1.9, 1.2), "
            f"got {quote(levels)}."
        )
    return levels


def check_levels(levels: Levels) -> None:
    """Raises ValueError if the method ``quantile`` of a distribution does not return positive levels as a tensor."""
    found = levels.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64, device="cpu"))
    if not isinstance(found, Tensor) or found.shape != (2,) or not bool((found > 0).all()):
        raise ValueError(
            f"quantile of levels must return a tensor of positive levels, one for each value of u, got {quote(found)} "
            "for 2 values."
        )


def uniforms(seed: int, start: int, stop: int) -> Tensor:
    """The numbers u of the images ``start`` to ``stop - 1`` of a run: float64 (stop - start,), strictly in (0, 1)."""
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / phi
    offset = np.uint64(2 * seed_of(seed, "levels"))
    bits = np.arange(start, stop, dtype=np.uint64) * golden + offset  # modulo 2^64: exact for any index
    return torch.from_numpy(((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def weighting_for(
    net: ScoreNet, weighting: Weighting | Callable[[Tensor], Tensor] | None, p: float
) -> Callable[[Tensor], Tensor] | None:
    """Converts the argument ``weighting`` of ``train`` to the one of ``dsm_loss``.

    Args:
        net: the network to train.
        weighting: "sigma" (w = sigma^p), "backbone" (w = 1 / abs(c_out)^p), "min-snr", or a function of sigma (N,),
            which is returned unchanged. None is "sigma" for the preconditioning "ncsn", whose backbone predicts the
            score itself, and "backbone" for every other.
        p: the power of the loss.

    Returns:
        A function of sigma (N,) that returns the weights (N,), or None for sigma^p.
    """
    if weighting is None:
        weighting = ROWS[net.precondition].weighting
    if callable(weighting):
        return weighting
    if weighting not in get_args(Weighting):
        raise ValueError(
            f"weighting must be one of {', '.join(map(repr, get_args(Weighting)))}, or a function of sigma, got "
            f"{weighting!r}."
        )
    if weighting == "sigma":
        return None
    if weighting == "min-snr":
        limit = math.sqrt(4 * variance_of(net) / _LARGEST_RATIO)  # sigma where r = 5
        return lambda sigma: (sigma * (sigma / limit).clamp(max=1)).pow(p)
    preconditioning = net.preconditioning

    def inverse(sigma: Tensor) -> Tensor:
        c_out = torch.as_tensor(preconditioning.coefficients(sigma).c_out, device=sigma.device)
        return c_out.abs().pow(-p).expand(*sigma.shape, *c_out.shape[1:])

    return inverse
