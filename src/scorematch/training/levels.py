r"""Noise levels and weights of the training loss: which levels are drawn how often, and how much each counts.

The loss at one level is :math:`w(\sigma)\, \tfrac{1}{p} \sum_i |s(x + \sigma z, \sigma)_i + z_i / \sigma|^p`. A
distribution of levels is given by its quantile function: a number u between 0 and 1 becomes a noise level.

==================  ==============================================  =================================================
levels              sigma                                           used by
==================  ==============================================  =================================================
a NoiseSchedule     its levels, equally often                       NCSN, NCSNv2, DDPM
``LogUniform``      log sigma uniform between two ends              NCSN++ (continuous)
``LogNormal``       log sigma normal                                EDM
==================  ==============================================  =================================================

Image i of a run has :math:`u_i = \operatorname{frac}(i / \varphi + u_0)`, phi being the golden ratio. Every stretch of
this sequence is spread evenly over (0, 1), so that each batch covers all levels, whatever its size and wherever it
begins, and the loss of a batch varies less than with independent levels.

==============  ========================  ============================================================================
weighting       w                         meaning
==============  ========================  ============================================================================
"sigma"         :math:`\sigma^p`          the error of the noise counts the same at every level (NCSN, DDPM)
"backbone"      :math:`1 / |c_{out}|^p`   the error of the backbone's output counts the same at every level (EDM)
==============  ========================  ============================================================================

With both, a network that predicts nothing has a loss of about D/2 for p = 2, D being the number of values in an image.

References:
    Song & Ermon, 2019, arXiv:1907.05600, Eq. 6. Song et al., 2021, arXiv:2011.13456, App. C.
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scorematch.noise import NoiseSchedule
from scorematch.precondition import Preconditioning
from scorematch.randomness import seed_of
from scorematch.score import ScoreNet

Weighting = Literal["sigma", "backbone"]


@runtime_checkable
class Levels(Protocol):
    """A distribution of noise levels."""

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels, positive and in the units of x, below which the share u of all levels lies.

        Args:
            u: float64 (n,), between 0 and 1.
        """


@dataclass(frozen=True)
class LogNormal:
    """Levels whose logarithm is normally distributed.

    Args:
        mean: of log sigma, with sigma in the units of x. EDM's -1.2 is for images in [-1, 1]; for images in [0, 1] it
            is -1.2 - log 2.
        std: of log sigma.

    Raises:
        ValueError: for values that are not finite, or a std that is not positive.

    Example:
        >>> LogNormal(0, 1).quantile(torch.tensor([0.5], dtype=torch.float64))
        tensor([1.], dtype=torch.float64)
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"a mean and a positive std were expected, got mean={self.mean!r} and std={self.std!r}.")

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u."""
        return (self.mean + self.std * torch.special.ndtri(u)).exp()


@dataclass(frozen=True)
class LogUniform:
    """Levels whose logarithm is uniform.

    Args:
        low: the lowest level, positive, in the units of x.
        high: the highest level.

    Raises:
        ValueError: for an empty range.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high < math.inf):
            raise ValueError(f"0 < low < high was expected, got low={self.low!r} and high={self.high!r}.")

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u."""
        return self.low * (self.high / self.low) ** u


@dataclass(frozen=True)
class ScheduleLevels:
    """The levels of a schedule, equally often.

    Args:
        schedule: the levels.
    """

    schedule: NoiseSchedule

    def quantile(self, u: Tensor) -> Tensor:
        """The noise levels at u, from the lowest of the schedule to the highest."""
        ascending = self.schedule.sigmas.flip(0)
        return ascending[(u * len(ascending)).long().clamp(max=len(ascending) - 1)]


def levels_for(net: ScoreNet, levels: Levels | NoiseSchedule | None) -> Levels:
    """The distribution that ``levels`` describes.

    Args:
        net: the network to train.
        levels: None is EDM's distribution for the row "karras", and the network's own schedule for every other row.

    Raises:
        TypeError: for something else than a distribution or a schedule.
    """
    if levels is None:
        if net.precondition != "karras":
            return ScheduleLevels(net.schedule)
        # Karras et al. 2022, Table 1: the logarithm of sigma for images in [-1, 1].
        return LogNormal(-1.2 - math.log(_preconditioning(net).units[0]), 1.2)
    if isinstance(levels, NoiseSchedule):
        return ScheduleLevels(levels)
    if not isinstance(levels, Levels):
        raise TypeError(
            "levels must be a NoiseSchedule or a distribution with a method quantile, such as LogNormal(-1.9, 1.2), "
            f"got {levels!r}."
        )
    return levels


def uniforms(seed: int, start: int, stop: int) -> Tensor:
    """The u of the images ``start`` to ``stop - 1`` of a run, float64 (stop - start,), strictly between 0 and 1."""
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / phi
    offset = np.uint64(2 * seed_of(seed, "levels"))
    bits = np.arange(start, stop, dtype=np.uint64) * golden + offset  # modulo 2^64: exact for any index
    return torch.from_numpy(((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def weighting_for(
    net: ScoreNet, weighting: Weighting | Callable[[Tensor], Tensor] | None, p: float
) -> Callable[[Tensor], Tensor] | None:
    """The weight of ``dsm_loss`` that ``weighting`` describes; None is sigma^p.

    Args:
        net: the network to train.
        weighting: None is "sigma" for the row "ncsn", whose backbone predicts the score itself, and "backbone" for
            every other row.
        p: the power of the loss.

    Raises:
        ValueError: for an unknown name.
    """
    if weighting is None:
        weighting = "sigma" if net.precondition == "ncsn" else "backbone"
    if callable(weighting):
        return weighting
    if weighting not in get_args(Weighting):
        raise ValueError(
            f"weighting must be one of {', '.join(map(repr, get_args(Weighting)))}, or a function of sigma, got "
            f"{weighting!r}."
        )
    if weighting == "sigma":
        return None
    preconditioning = _preconditioning(net)

    def inverse(sigma: Tensor) -> Tensor:
        c_out = torch.as_tensor(preconditioning.coefficients(sigma).c_out, device=sigma.device)
        return c_out.abs().pow(-p).expand(sigma.shape)

    return inverse


def _preconditioning(net: ScoreNet) -> Preconditioning:
    return Preconditioning(net.precondition, net.schedule, net.value_range, net.predicts_variance)
