r"""Noise schedules: which noise levels there are, from the highest to the lowest, and how to choose them.

Noisy data are :math:`x_0 + \sigma z` with z standard normal, at levels
:math:`\sigma_1 > \sigma_2 > \dots > \sigma_L > 0`. A score network learns all levels at once, and annealed Langevin
dynamics visits them in order: at high levels it finds the modes of the data, at low levels it draws the details. Sigma
has the units of the data; for images in [0, 1], 0.01 is 2.55 gray levels of 255.

Song & Ermon (2020) choose a schedule by these techniques:

1. :math:`\sigma_1` is the largest distance between two training images (``from_data``).
2. The ratio :math:`\gamma = \sigma_{i-1}/\sigma_i` makes neighboring levels overlap. The norm of noise of level i has
   mean :math:`\sqrt{D}\,\sigma_i` and standard deviation :math:`\sigma_i/\sqrt{2}`, and gamma solves
   :math:`\Phi(\sqrt{2D}(\gamma-1)+3\gamma) - \Phi(\sqrt{2D}(\gamma-1)-3\gamma) = C` (``suggest_levels``).
3. The network divides its output by sigma (see ``scorematch.precondition``).
4. The step size is the one for which the variance after a level is closest to the right one (``suggest_step_size``).

Technique 2 is derived for images. In few dimensions noise of all levels overlaps, and the equation has a very large
solution or none. What limits the ratio there is the step from one level to the next: on Gaussian data of any dimension
and covariance, a sampler that takes one Euler step of the probability flow per level ends with a standard deviation
that is too small by the factor :math:`\gamma^{-1/4}`. The ratio is therefore limited to :math:`0.95^{-4} \approx 1.23`,
at which 5 % is lost. For C = 0.5 this changes nothing from D = 131 on, which is less than an image of 12 x 12 pixels.

The factor follows from data of variance :math:`s^2` and :math:`u = \sigma^2 / (s^2 + \sigma^2)`. An Euler step
multiplies their deviation by :math:`1 - (1 - 1/\gamma) u`, and the exact flow by :math:`\sqrt{1 - (1 - 1/\gamma^2) u}`.
The logarithm of the quotient is :math:`-\tfrac12 h^2 u (1 - u)` in :math:`h = \log \gamma`, and the sum over all levels
:math:`-\tfrac{h}{2} \int u (1 - u)\, d\log\sigma = -\tfrac{h}{4}`.

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scorematch.randomness import single_generator

# A schedule of one level has no ratio from which technique 4 could find a step. At a tenth of sigma^2 the variance
# after many steps is 1 / (1 - 0.1 / 2), five percent too large.
_SINGLE_LEVEL_STEP = 0.1
_LARGEST_RATIO = 0.95**-4  # of neighboring levels in ``suggest_levels``; see the module
_DISTANCE_BLOCK = 2048  # images compared at a time in technique 1
# Data in other units leave the range by much more than this share of it; interpolation of images overshoots by less.
_OVERSHOOT = 0.1


@dataclass(frozen=True, init=False, repr=False)
class NoiseSchedule:
    """Noise levels, from the highest to the lowest: an immutable value, equal to any schedule of the same levels.

    Args:
        sigmas: the levels (L,), positive and strictly descending, in the units of the data; a sequence, an array or a
            tensor. Kept in float64.

    Raises:
        TypeError: if the levels are not numbers.
        ValueError: if there is no level, or the levels are not one-dimensional, finite, positive and strictly
            descending.

    Example:
        >>> schedule = NoiseSchedule.geometric(50, 0.01, levels=232)
        >>> schedule
        NoiseSchedule(232 levels, 50 -> 0.01)
        >>> round(schedule.suggest_step_size(steps_per_level=5), 8)
        6.18e-06
    """

    _values: tuple[float, ...]
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(compare=False)  # copies of the levels on devices

    def __init__(self, sigmas: Sequence[float] | np.ndarray | Tensor) -> None:
        if isinstance(sigmas, Tensor):
            sigmas = sigmas.detach().cpu().double().numpy()
        try:
            array = np.asarray(sigmas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"sigmas must be numbers, such as [1.0, 0.1, 0.01], got {sigmas!r}.") from error
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"sigmas must be one-dimensional with at least one level, got shape {array.shape}.")
        if not np.isfinite(array).all() or (array <= 0).any():
            wrong = array[~(np.isfinite(array) & (array > 0))][0]
            raise ValueError(f"every sigma must be positive and finite, got {wrong:g}.")
        if (np.diff(array) >= 0).any():
            i = int(np.argmax(np.diff(array) >= 0))
            raise ValueError(
                f"sigmas must be strictly descending, but level {i} is {array[i]:g} and level {i + 1} is "
                f"{array[i + 1]:g}. Write sorted(set(sigmas), reverse=True)."
            )
        object.__setattr__(self, "_values", tuple(array.tolist()))
        object.__setattr__(self, "_tables", {})

    # -- Constructors -------------------------------------------------------------------------------------------------

    @classmethod
    def geometric(cls, sigma_max: float, sigma_min: float, levels: int) -> NoiseSchedule:
        """The schedule with a constant ratio between neighboring levels.

        Args:
            sigma_max: the highest level, in the units of the data.
            sigma_min: the lowest level, positive, below ``sigma_max``.
            levels: the number of levels, at least 2.

        Raises:
            ValueError: for a range that is empty or not positive, or fewer than 2 levels.

        Example:
            >>> [round(sigma, 3) for sigma in NoiseSchedule.geometric(1, 0.01, levels=3)]
            [1.0, 0.1, 0.01]
        """
        _check_range(sigma_max, sigma_min)
        _check_count("levels", levels, at_least=2)
        sigmas = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), levels))
        sigmas[0], sigmas[-1] = sigma_max, sigma_min  # exp(log(x)) is not always x
        return cls(sigmas)

    @classmethod
    def karras(cls, sigma_max: float, sigma_min: float, levels: int, *, rho: float = 7) -> NoiseSchedule:
        r"""The schedule with equal steps in :math:`\sigma^{1/\rho}`: few high levels, many low ones.

        At rho = 1 it is linear, and as rho grows it becomes geometric. 7 is the value for solvers of the probability
        flow.

        Args:
            sigma_max: the highest level, in the units of the data.
            sigma_min: the lowest level, positive, below ``sigma_max``.
            levels: the number of levels, at least 2.
            rho: the exponent, positive; the larger, the more of the levels are low.

        Raises:
            ValueError: for a range that is empty or not positive, fewer than 2 levels, or a rho that is not positive.

        Example:
            >>> [round(sigma, 3) for sigma in NoiseSchedule.karras(80, 0.002, levels=4)]
            [80.0, 9.723, 0.47, 0.002]

        References:
            Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364,
            Eq. 5.
        """
        _check_range(sigma_max, sigma_min)
        _check_count("levels", levels, at_least=2)
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"rho must be positive and finite, got {rho!r}.")
        sigmas = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), levels) ** rho
        sigmas[0], sigmas[-1] = sigma_max, sigma_min
        return cls(sigmas)

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | Tensor) -> NoiseSchedule:
        r"""The noise levels of a DDPM, in the units of images in [0, 1].

        A DDPM scales images of [-1, 1] by :math:`\sqrt{\bar\alpha_t}` and adds noise of variance
        :math:`1 - \bar\alpha_t`, with :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`. Relative to the scaled
        image that is noise of standard deviation :math:`\sqrt{1/\bar\alpha_t - 1}`, and half of it for images in
        [0, 1].

        Args:
            betas: the variances (T,) in the order of training, the first step first, each between 0 and 1.

        Raises:
            ValueError: if a beta is not strictly between 0 and 1.

        Example:
            >>> NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
            NoiseSchedule(1000 levels, 78.7 -> 0.005)

        References:
            Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
        """
        values = betas.detach().cpu().double().numpy() if isinstance(betas, Tensor) else np.asarray(betas, np.float64)
        if values.ndim != 1 or values.size == 0 or not ((values > 0) & (values < 1)).all():
            raise ValueError("betas must be a one-dimensional sequence of numbers strictly between 0 and 1.")
        # log1p and expm1 keep the digits of the first steps, where 1/alpha_bar - 1 is 1e-4.
        log_alpha_bar = np.cumsum(np.log1p(-values))
        return cls(0.5 * np.sqrt(np.expm1(-log_alpha_bar))[::-1])

    @classmethod
    def from_data(
        cls,
        images: Tensor | np.ndarray,
        sigma_min: float = 0.01,
        *,
        C: float = 0.5,  # noqa: N803  (the paper's letter)
        max_images: int = 10_000,
        value_range: tuple[float, float] | Literal["auto"] | None = "auto",
        generator: torch.Generator | int | None = None,
    ) -> NoiseSchedule:
        """A geometric schedule for a data set, by techniques 1 and 2 of NCSNv2.

        The highest level is the largest distance between two images, and the number of levels follows from the
        dimension. Distances take time quadratic in the number of images, so a random subset represents a large set.

        Args:
            images: the data (N, ...), floating point; images in [0, 1]; at least two that differ.
            sigma_min: the lowest level, in the units of the data.
            C: the overlap of neighboring levels, between 0 and 0.997. The paper says about 0.5, which gives 219 levels
                for CIFAR-10's range of 50 to 0.01; the authors' published 232 levels correspond to 0.567. In few
                dimensions the ratio is limited in another way; see the module.
            max_images: the largest number of images that are compared.
            value_range: (low, high) of the data, which data in other units leave; None for data without a range. "auto"
                is (0, 1) for images (N, C, H, W) and None otherwise.
            generator: the source of the subset: a ``torch.Generator``, or a seed; None is torch's global generator.

        Raises:
            TypeError: for data that are not floating point.
            ValueError: for fewer than two images, NaN or infinity, values outside the range by more than a tenth of it,
                or images that are all equal.

        Example:
            >>> points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
            >>> NoiseSchedule.from_data(points)
            NoiseSchedule(34 levels, 7.37 -> 0.01)
        """
        try:
            data = torch.as_tensor(images)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"images must be a tensor or an array (N, ...), got {type(images).__name__}. A batch of a data set "
                "with labels is [x, y]: pass its first entry."
            ) from error
        if not data.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], got {data.dtype}. Write images / 255 for 8-bit images."
            )
        if data.ndim < 2 or len(data) < 2:
            raise ValueError(f"a schedule needs at least two images (N, ...), got shape {tuple(data.shape)}.")
        _check_count("max_images", max_images, at_least=2)
        if value_range == "auto":
            value_range = (0, 1) if data.ndim == 4 else None
        _check_values(data, value_range)
        source = single_generator(generator)
        data = data.flatten(1)
        if len(data) > max_images:
            device = None if source is None else source.device
            data = data[torch.randperm(len(data), generator=source, device=device)[:max_images].to(data.device)]
        sigma_max = _largest_distance(data.float())
        if sigma_max <= sigma_min:
            raise ValueError(
                f"the largest distance between two images is {sigma_max:g}, but must be above sigma_min={sigma_min:g}: "
                "the images are (nearly) equal, or sigma_min is too large."
            )
        return cls.geometric(sigma_max, sigma_min, cls.suggest_levels(sigma_max, sigma_min, data.shape[1], C=C))

    @staticmethod
    def suggest_levels(sigma_max: float, sigma_min: float, dimension: int, *, C: float = 0.5) -> int:  # noqa: N803
        """The number of levels for a range, by technique 2 of NCSNv2, with a limit in few dimensions.

        Args:
            sigma_max: the highest level, in the units of the data.
            sigma_min: the lowest level.
            dimension: the number of values in one image, D = channels x height x width.
            C: the overlap of neighboring levels (see ``from_data``).

        Returns:
            The number of levels, at least 2. Neighboring levels of the geometric schedule then have technique 2's ratio
            or, in few dimensions, one of at most 1.23; the module says why.

        Raises:
            ValueError: for an empty range, a dimension below 1 or a C outside (0, 0.997).

        Example:
            >>> NoiseSchedule.suggest_levels(50, 0.01, 3 * 32 * 32)
            219
        """
        _check_range(sigma_max, sigma_min)
        _check_count("dimension", dimension)
        top = math.erf(3 / math.sqrt(2))  # the C of two equal levels
        if not 0 < C < top:
            raise ValueError(f"C must be between 0 and {top:.3f}, got {C!r}; the paper's value is about 0.5.")

        def phi(t: float) -> float:
            return 0.5 * (1 + math.erf(t / math.sqrt(2)))

        def overlap(excess: float) -> float:
            shift = math.sqrt(2 * dimension) * excess
            return phi(shift + 3 * (1 + excess)) - phi(shift - 3 * (1 + excess))

        distance = math.log(sigma_max / sigma_min)
        low, high = 0.0, _LARGEST_RATIO - 1  # of gamma - 1, at which the overlap is C
        if overlap(high) > C:
            return max(2, 1 + math.ceil(distance / math.log(_LARGEST_RATIO)))
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if overlap(middle) > C else (low, middle)
        return max(2, 1 + round(distance / math.log1p(high)))

    def respaced(self, levels: int) -> NoiseSchedule:
        """The same range with another number of levels, along the shape of this schedule in log sigma.

        Args:
            levels: the number of levels, at least 2 (1 if this schedule has one level).

        Raises:
            ValueError: for fewer levels than that.

        Example:
            >>> NoiseSchedule.geometric(50, 0.01, levels=232).respaced(50)
            NoiseSchedule(50 levels, 50 -> 0.01)
        """
        _check_count("levels", levels, at_least=min(2, len(self)))
        if levels == len(self):
            return self
        if len(self) == 1:
            raise ValueError(f"a schedule of one level has no range for {levels} levels.")
        positions = np.linspace(0, len(self) - 1, levels)
        sigmas = np.exp(np.interp(positions, np.arange(len(self)), np.log(self._values)))
        sigmas[0], sigmas[-1] = self.sigma_max, self.sigma_min
        return NoiseSchedule(sigmas)

    # -- The levels ---------------------------------------------------------------------------------------------------

    @property
    def sigmas(self) -> Tensor:
        """The levels, (L,) float64 on the CPU, the highest first. A copy: the schedule itself does not change."""
        return torch.tensor(self._values, dtype=torch.float64)

    @property
    def sigma_max(self) -> float:
        """The highest level, in the units of the data."""
        return self._values[0]

    @property
    def sigma_min(self) -> float:
        """The lowest level, in the units of the data."""
        return self._values[-1]

    def position(self, sigma: float | Tensor) -> Tensor:
        """The position of a noise level in the schedule: its fractional index, linear in log sigma.

        Args:
            sigma: noise levels of any shape, positive; levels beyond the ends of the schedule are clamped to them.

        Returns:
            The positions, of sigma's shape, in [0, L - 1], where 0 is the highest level. Float32, or float64 where
            sigma is a float or a float64 tensor. A level of the schedule, rounded to sigma's precision, gives exactly
            its index.

        Example:
            >>> NoiseSchedule([1.0, 0.1, 0.01]).position(0.1)
            tensor(1., dtype=torch.float64)
        """
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor(sigma, dtype=torch.float64)
        dtype = torch.promote_types(sigma.dtype, torch.float32)
        sigma = sigma.to(dtype)
        table = self._table(sigma.device, dtype)
        if len(self) == 1:
            return torch.zeros_like(sigma)
        # searchsorted needs ascending values, hence the signs. The logarithms are of ratios, which are exactly 1 at a
        # level; a difference of two logarithms would not be exactly 0.
        lower = (torch.searchsorted(-table, -sigma.contiguous(), right=True) - 1).clamp(0, len(self) - 2)
        above, below = table.take(lower), table.take(lower + 1)  # table[lower] would read a 0-d index on the host
        return lower + (torch.log(sigma / above) / torch.log(below / above)).clamp(0, 1)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key not in self._tables:
            self._tables[key] = self.sigmas.to(dtype).to(device)  # cast first: not every device has float64
        return self._tables[key]

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, level: int) -> float:
        return self._values[level]

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def __repr__(self) -> str:
        if len(self) == 1:
            return f"NoiseSchedule(1 level, {self.sigma_max:.3g})"
        return f"NoiseSchedule({len(self)} levels, {self.sigma_max:.3g} -> {self.sigma_min:.3g})"

    def __reduce__(self) -> tuple[type[NoiseSchedule], tuple[tuple[float, ...]]]:
        return NoiseSchedule, (self._values,)  # copies and pickles leave out the tables

    def to_dict(self) -> dict[str, list[float]]:
        """The levels as plain numbers for JSON, from which ``from_dict`` restores exactly this schedule."""
        return {"sigmas": list(self._values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that ``to_dict`` wrote.

        Raises:
            ValueError: if there are other keys, or the levels are not those of a schedule.
        """
        if not isinstance(values, Mapping) or set(values) != {"sigmas"}:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise ValueError(f'a schedule must be written {{"sigmas": [...]}}, got {found!r}.')
        return cls(values["sigmas"])

    # -- Training and sampling ----------------------------------------------------------------------------------------

    def sample(
        self, n: int, *, generator: torch.Generator | int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Noise levels for training, drawn uniformly from the levels of the schedule.

        Args:
            n: the number of noise levels to draw.
            generator: a ``torch.Generator``, or a seed; None is torch's global generator. The levels are drawn on the
                generator's device and then moved.
            device: of the result; None is the generator's device, or the CPU.

        Returns:
            The levels (n,), float32, in the units of the data.

        Raises:
            TypeError, ValueError: if n is not an integer of at least 1.
        """
        _check_count("n", n)
        generator = single_generator(generator)
        source = torch.device("cpu") if generator is None else generator.device
        index = torch.randint(len(self), (n,), generator=generator, device=source)
        target = source if device is None else torch.device(device)
        return self._table(target, torch.float32)[index.to(target)]

    def suggest_step_size(self, steps_per_level: int) -> float:
        r"""The step size of annealed Langevin dynamics, by technique 4 of NCSNv2.

        With :math:`a = \epsilon/\sigma_L^2` and :math:`b = 2a/(1-(1-a)^2)`, the variance after T steps at a level is
        :math:`(1-a)^{2T} (\gamma^2 - b) + b` in units of the level's own, if the chain enters the level with exactly
        the variance of the level before. It is above one for every a, and epsilon is where it is smallest. A schedule
        that is not geometric is treated as the geometric one of the same range and length. For a single level the step
        is a fixed fraction, 0.1, of :math:`\sigma^2`.

        Args:
            steps_per_level: T, at least 1.

        Returns:
            epsilon, in units of sigma squared, in the convention ``x + a score + sqrt(2 a) z`` of Song & Ermon (2020).
        """
        _check_count("steps_per_level", steps_per_level)
        if len(self) == 1:
            return _SINGLE_LEVEL_STEP * self.sigma_min**2
        a = math.exp(_minimize(lambda log_a: self._level_variance(math.exp(log_a), steps_per_level), -25.0, 0.0))
        return a * self.sigma_min**2

    def level_variance(self, step_size: float, steps_per_level: int) -> float:
        r"""Technique 4's variance after one level, in units of the level's own :math:`\sigma_i^2`.

        :math:`q (\gamma^2 - b) + b` with :math:`q = (1-a)^{2T}`, for a chain that enters the level with exactly the
        variance of the level before. One is right; ``chain_variance`` is the result of a whole schedule.

        Args:
            step_size: epsilon, below twice the square of the lowest level.
            steps_per_level: T, at least 1.
        """
        _check_count("steps_per_level", steps_per_level)
        return self._level_variance(self._a(step_size), steps_per_level)

    def chain_variance(self, step_size: float, steps_per_level: int) -> float:
        r"""The variance at the end of a long schedule, in units of :math:`\sigma_L^2`.

        Each level inherits the excess of the one before. The fixed point of technique 4's recursion is
        :math:`b (1-q) / (1 - q \gamma^2)` with :math:`q = (1-a)^{2T}`. It is infinite where the chain cannot follow the
        schedule, :math:`q \gamma^2 \ge 1`. The published settings for CIFAR-10 give 1.13.

        Args:
            step_size: epsilon, below twice the square of the lowest level.
            steps_per_level: T, at least 1.
        """
        _check_count("steps_per_level", steps_per_level)
        a = self._a(step_size)
        q = (1 - a) ** (2 * steps_per_level)
        q_gamma2 = q * self._ratio**2
        return math.inf if q_gamma2 >= 1 else (1 - q) / ((1 - a / 2) * (1 - q_gamma2))

    def _a(self, step_size: float) -> float:
        a = step_size / self.sigma_min**2
        if not 0 < a < 2:
            raise ValueError(
                f"step_size must be between 0 and 2 sigma_min^2 = {2 * self.sigma_min**2:.3g}, got {step_size!r}."
            )
        return a

    @property
    def _ratio(self) -> float:
        """gamma, the mean ratio of neighboring levels."""
        return (self.sigma_max / self.sigma_min) ** (1 / max(1, len(self) - 1))

    def _level_variance(self, a: float, steps: int) -> float:
        q = (1 - a) ** (2 * steps)
        return q * self._ratio**2 + (1 - q) / (1 - a / 2)  # b = 1 / (1 - a / 2)


def _check_range(sigma_max: float, sigma_min: float) -> None:
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ValueError(f"expected sigma_max > sigma_min > 0, got sigma_max={sigma_max!r}, sigma_min={sigma_min!r}.")


def _check_count(name: str, value: int, *, at_least: int = 1) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def _check_values(data: Tensor, value_range: tuple[float, float] | None) -> None:
    low, high = (float(value) for value in data.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images contain NaN or infinity; a schedule needs finite data.")
    if value_range is None:
        return
    margin = _OVERSHOOT * (value_range[1] - value_range[0])
    if low < value_range[0] - margin or high > value_range[1] + margin:
        raise ValueError(
            f"images must have values in [{value_range[0]:g}, {value_range[1]:g}], got values from {low:.3g} to "
            f"{high:.3g}. Write (images + 1) / 2 for images in [-1, 1], images / 255 for 8-bit values, or "
            "value_range=None for data without a range."
        )


def _largest_distance(points: Tensor) -> float:
    """The largest Euclidean distance between two of the points (N, D)."""
    best, pair = -1.0, (0, 0)
    for i in range(0, len(points), _DISTANCE_BLOCK):
        for j in range(i, len(points), _DISTANCE_BLOCK):
            distances = torch.cdist(points[i : i + _DISTANCE_BLOCK], points[j : j + _DISTANCE_BLOCK])
            k = int(distances.argmax())
            if float(distances.flatten()[k]) > best:
                best, pair = float(distances.flatten()[k]), (i + k // distances.shape[1], j + k % distances.shape[1])
    # cdist computes a matrix product and loses digits, so the distance of the pair is computed again.
    return float(torch.linalg.vector_norm(points[pair[0]].cpu().double() - points[pair[1]].cpu().double()))


def _minimize(function: Callable[[float], float], low: float, high: float) -> float:
    """The argument of the minimum of a function that has one, by golden-section search."""
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    f_left, f_right = function(left), function(right)
    while high - low > 1e-10:
        if f_left < f_right:
            high, right, f_right = right, left, f_left
            left = high - golden * (high - low)
            f_left = function(left)
        else:
            low, left, f_left = left, right, f_right
            right = low + golden * (high - low)
            f_right = function(right)
    return (low + high) / 2
