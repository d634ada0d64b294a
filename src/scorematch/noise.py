r"""Noise schedules: the noise levels of a network or a sampler, from the highest to the lowest, and how to choose them.

Noisy data are :math:`x_0 + \sigma z` with z standard normal, at levels
:math:`\sigma_1 > \sigma_2 > \dots > \sigma_L > 0`. One score network learns all levels, and annealed Langevin dynamics
visits them in descending order: at high levels it finds the modes of the data, at low levels the details. Sigma has the
units of the data; for images in [0, 1], 0.01 is 2.55 of 255 gray levels.

Song & Ermon (2020) choose the schedule, the network and the step size by these techniques:

1. :math:`\sigma_1` is the largest distance between two training images (``from_data``).
2. The ratio :math:`\gamma = \sigma_{i-1}/\sigma_i` is chosen such that neighboring levels overlap. In D dimensions the
   norm of noise of level i has mean :math:`\sqrt{D}\,\sigma_i` and standard deviation :math:`\sigma_i/\sqrt{2}`, and
   gamma solves :math:`\Phi(\sqrt{2D}(\gamma-1)+3\gamma) - \Phi(\sqrt{2D}(\gamma-1)-3\gamma) = C`, where Phi is the
   standard normal distribution function and C the overlap (``suggest_levels``).
3. The output of the network is divided by sigma (see ``scorematch.nets.precondition``).
4. The step size brings the variance after each level as close to that level's as possible (``suggest_step_size``).

Technique 2 is derived for images. In few dimensions the noise of all levels overlaps, and the equation has a very large
solution or none. There the error of the step from one level to the next limits the ratio: on Gaussian data of any
dimension and covariance, a sampler that takes one Euler step of the probability flow per level ends with a standard
deviation that is too small by the factor :math:`\gamma^{-1/4}`. The ratio is therefore limited to
:math:`0.95^{-4} \approx 1.23`, at which the standard deviation is 5 % too small. For C = 0.5 the limit has no effect
from D = 131 on, which is less than the number of pixels of a 12 x 12 image.

The factor is derived as follows. Let the data have variance :math:`s^2`, and let
:math:`u = \sigma^2 / (s^2 + \sigma^2)`. An Euler step multiplies the standard deviation by
:math:`1 - (1 - 1/\gamma) u`, and the exact flow by :math:`\sqrt{1 - (1 - 1/\gamma^2) u}`. To leading order in
:math:`h = \log \gamma` the logarithm of their quotient is :math:`-\tfrac12 h^2 u (1 - u)`, and its sum over all levels
is :math:`-\tfrac{h}{2} \int u (1 - u)\, d\log\sigma = -\tfrac{h}{4}`.

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from scorematch.core.arguments import argument, check_count
from scorematch.core.batches import check_data, is_outside
from scorematch.core.provenance import Entries
from scorematch.core.randomness import single_generator
from scorematch.core.scores import attribute

__all__ = ["NoiseSchedule"]

# The step size in units of sigma^2 for a schedule of one level, for which technique 4 is not defined. The variance
# after many steps is 1 / (1 - 0.1 / 2) times sigma^2, five percent too large.
_SINGLE_LEVEL_STEP = 0.1
_LARGEST_RATIO = 0.95**-4  # the limit of gamma in ``suggest_levels``; see the module docstring
_DISTANCE_BLOCK = 2048  # images compared at a time in technique 1
_ROUNDING = 2**-24  # the relative rounding error of float32
_LOWEST, _HIGHEST = 1e-18, 1e18  # the squares of levels are in float32


@dataclass(frozen=True, init=False, repr=False)
class NoiseSchedule(Entries[float]):
    """Noise levels, from the highest to the lowest. Schedules are immutable; two with the same levels are equal.

    ``len(schedule)`` is the number of levels L, ``schedule[i]`` is level i as a float, 0 being the highest, and
    iteration yields the levels as floats.

    Args:
        sigmas: the levels (L,), positive and strictly descending, in the units of the data; a sequence, an array or a
            tensor. They are stored in float64.

    Example:
        >>> schedule = NoiseSchedule.geometric(50, 0.01, levels=232)
        >>> schedule
        NoiseSchedule(232 levels, 50 -> 0.01)
        >>> round(schedule.suggest_step_size(steps_per_level=5), 8)
        6.18e-06
    """

    _values: tuple[float, ...]
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(compare=False)  # cached copies of the levels

    def __init__(self, sigmas: Sequence[float] | np.ndarray | Tensor) -> None:
        if isinstance(sigmas, Tensor):
            sigmas = sigmas.detach().cpu().double().numpy()
        try:
            array = np.asarray(sigmas, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"sigmas must be numbers, such as [1.0, 0.1, 0.01], got {sigmas!r}.") from error
        if array.ndim != 1 or array.size == 0:
            raise ValueError(f"sigmas must be one-dimensional with at least one level, got shape {array.shape}.")
        wrong = array[~((array >= _LOWEST) & (array <= _HIGHEST))]  # also NaN
        if len(wrong):
            hint = " Leave out the level 0: samplers end with a step to it." if wrong[0] == 0 else ""
            raise ValueError(f"every sigma must be positive, from {_LOWEST:g} to {_HIGHEST:g}, got {wrong[0]:g}.{hint}")
        if (np.diff(array) >= 0).any():
            i = int(np.argmax(np.diff(array) >= 0))
            raise ValueError(
                f"sigmas must be strictly descending, but level {i} is {array[i]:g} and level {i + 1} is "
                f"{array[i + 1]:g}. Write np.unique(sigmas)[::-1]."
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

        Example:
            >>> [round(sigma, 3) for sigma in NoiseSchedule.geometric(1, 0.01, levels=3)]
            [1.0, 0.1, 0.01]
        """
        _check_range(sigma_max, sigma_min)
        check_count("levels", levels, 2)
        sigmas = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), levels))
        sigmas[0], sigmas[-1] = sigma_max, sigma_min  # exp(log(x)) is not always x
        return cls(sigmas)

    @classmethod
    def karras(cls, sigma_max: float, sigma_min: float, levels: int, *, rho: float = 7) -> NoiseSchedule:
        r"""The schedule with equal steps in :math:`\sigma^{1/\rho}`: few high levels, many low ones.

        With rho = 1 it is linear in sigma, and for large rho it approaches the geometric schedule. Karras et al. use 7
        for solvers of the probability flow.

        Args:
            sigma_max: the highest level, in the units of the data.
            sigma_min: the lowest level, positive, below ``sigma_max``.
            levels: the number of levels, at least 2.
            rho: the exponent, positive. The larger it is, the more levels are low.

        Example:
            >>> [round(sigma, 3) for sigma in NoiseSchedule.karras(80, 0.002, levels=4)]
            [80.0, 9.723, 0.47, 0.002]

        References:
            Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364,
            Eq. 5.
        """
        _check_range(sigma_max, sigma_min)
        check_count("levels", levels, 2)
        if not (math.isfinite(rho) and rho > 0):
            raise ValueError(f"rho must be positive and finite, got {rho!r}.")
        # Relative to sigma_max, whose own root can overflow for a small rho and is rounded to 1 for a large one.
        root = math.expm1((math.log(sigma_min) - math.log(sigma_max)) / rho)  # (sigma_min / sigma_max)^(1 / rho) - 1
        between = sigma_max * np.exp(rho * np.log1p(np.linspace(0, 1, levels)[1:-1] * root))
        return cls([sigma_max, *between, sigma_min])

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray | Tensor) -> NoiseSchedule:
        r"""The noise levels of a DDPM, in the units of images in [0, 1].

        A DDPM scales images in [-1, 1] by :math:`\sqrt{\bar\alpha_t}` and adds noise of variance
        :math:`1 - \bar\alpha_t`, with :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`. Divided by the scale, the
        noise has the standard deviation :math:`\sqrt{1/\bar\alpha_t - 1}`, and half of it in the units of images in
        [0, 1].

        Args:
            betas: the variances (T,) of the diffusion steps t = 1 to T, each strictly between 0 and 1.

        Example:
            >>> NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
            NoiseSchedule(1000 levels, 78.7 -> 0.005)

        References:
            Ho et al., 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239.
        """
        values = betas.detach().cpu().double().numpy() if isinstance(betas, Tensor) else np.asarray(betas, np.float64)
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"betas must be one-dimensional with at least one number, got shape {values.shape}.")
        inside = (values > 0) & (values < 1)
        if not inside.all():
            raise ValueError(f"every beta must be strictly between 0 and 1, got {values[~inside][0]:g}.")
        # log1p and expm1 are accurate at the first steps, where 1/alpha_bar - 1 is 1e-4.
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

        The highest level is the largest Euclidean distance between two images, and the number of levels follows from
        the dimension. Computing the distances takes time quadratic in the number of images; of a set larger than
        ``max_images`` a random subset is used.

        Args:
            images: the data (N, ...), floating point; images in [0, 1]; at least two that differ.
            sigma_min: the lowest level, in the units of the data, positive and below the largest distance.
            C: the overlap of neighboring levels, between 0 and 0.997. The paper recommends about 0.5, which gives 219
                levels for CIFAR-10's range of 50 to 0.01; the authors' published 232 levels correspond to 0.567. In few
                dimensions another limit determines the ratio; see the module docstring.
            max_images: the largest number of images that are compared, at least 2.
            value_range: (low, high) of the data, to detect data in other units; None is for data without a fixed range.
                "auto" is (0, 1) for images (N, C, H, W) and None otherwise.
            generator: the source of the subset: a ``torch.Generator``, or a seed; None is torch's global generator.

        Raises:
            TypeError: if the data are not floating point.
            ValueError: for fewer than two images, NaN or infinity, values outside ``value_range`` by more than a tenth
                of its width, or a largest distance that is not above ``sigma_min``.

        Example:
            >>> points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
            >>> NoiseSchedule.from_data(points)
            NoiseSchedule(34 levels, 7.37 -> 0.01)
        """
        if isinstance(images, np.ndarray):  # torch accepts neither negative strides nor a foreign byte order
            images = np.ascontiguousarray(images, images.dtype.newbyteorder("="))
        try:
            data = torch.as_tensor(images, device=getattr(images, "device", "cpu")).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"images must be a tensor or an array (N, ...), got {type(images).__name__}. A batch of a data set "
                "with labels is [x, y]: pass its first entry. For a list of images, write torch.stack(images)."
            ) from error
        check_data(data, "images")
        if len(data) < 2:
            raise ValueError(f"images must be (N, ...) with at least two images, got shape {tuple(data.shape)}.")
        check_count("max_images", max_images, 2)
        if value_range == "auto":
            value_range = (0, 1) if data.ndim == 4 else None
        _check_values(data, value_range)
        source = single_generator(generator)
        data = data.flatten(1)
        if len(data) > max_images:
            device = None if source is None else source.device
            data = data[torch.randperm(len(data), generator=source, device=device)[:max_images].to(data.device)]
        sigma_max = _largest_distance(data)
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

        Example:
            >>> NoiseSchedule.suggest_levels(50, 0.01, 3 * 32 * 32)
            219
        """
        _check_range(sigma_max, sigma_min)
        check_count("dimension", dimension)
        top = math.erf(3 / math.sqrt(2))  # the overlap at gamma = 1
        if not 0 < C < top:
            raise ValueError(f"C must be between 0 and {top:.3f}, got {C!r}; the paper's value is about 0.5.")

        def phi(t: float) -> float:
            return 0.5 * (1 + math.erf(t / math.sqrt(2)))

        def overlap(excess: float) -> float:
            shift = math.sqrt(2 * dimension) * excess
            return phi(shift + 3 * (1 + excess)) - phi(shift - 3 * (1 + excess))

        distance = math.log(sigma_max / sigma_min)
        low, high = 0.0, _LARGEST_RATIO - 1  # bounds of the gamma - 1 at which the overlap is C
        if overlap(high) > C:
            return max(2, 1 + math.ceil(distance / math.log(_LARGEST_RATIO)))
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if overlap(middle) > C else (low, middle)
        return max(2, 1 + round(distance / math.log1p(high)))

    def respaced(self, levels: int) -> NoiseSchedule:
        """A schedule with another number of levels, interpolated linearly between the log sigma of these levels.

        Args:
            levels: the number of levels, at least 2; 1 if this schedule has one level.

        Returns:
            The schedule, whose highest and lowest level are those of this schedule.

        Example:
            >>> NoiseSchedule.geometric(50, 0.01, levels=232).respaced(50)
            NoiseSchedule(50 levels, 50 -> 0.01)
        """
        check_count("levels", levels, min(2, len(self)))
        if levels == len(self):
            return self
        if len(self) == 1:
            raise ValueError(f"levels must be 1 for a schedule of one level, got {levels}.")
        positions = np.linspace(0, len(self) - 1, levels)
        sigmas = np.exp(np.interp(positions, np.arange(len(self)), np.log(self._values)))
        sigmas[0], sigmas[-1] = self.sigma_max, self.sigma_min
        return NoiseSchedule(sigmas)

    def without_gaps(self, levels: int) -> NoiseSchedule:
        """The schedule ``respaced(levels)``, or the geometric one of the same range if that one has no wider gaps.

        The lowest of the 1,000 levels of a DDPM are far apart: respaced to 50 levels, the last two would differ by a
        factor of eight. A sampler that adds noise would then leave too much of it.

        Args:
            levels: the number of levels, as for ``respaced``.

        Example:
            >>> ddpm = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
            >>> [round(schedule.smallest_ratio, 2) for schedule in (ddpm.respaced(50), ddpm.without_gaps(50))]
            [0.12, 0.82]
        """
        respaced = self.respaced(levels)
        if len(respaced) == 1:
            return respaced
        even = NoiseSchedule.geometric(self.sigma_max, self.sigma_min, levels)
        return even if respaced.smallest_ratio < 0.9999 * even.smallest_ratio else respaced

    def nearest(self, others: NoiseSchedule) -> NoiseSchedule:
        """The levels of this schedule that are nearest to those of another schedule, in log sigma, each of them once.

        Example:
            >>> list(NoiseSchedule([8.0, 4.0, 2.0, 1.0]).nearest(NoiseSchedule([7.0, 5.0, 4.5, 1.1])))
            [8.0, 4.0, 1.0]
        """
        positions = {round(float(self.position(sigma))) for sigma in others}
        return NoiseSchedule([self[i] for i in sorted(positions)])

    def between(self, sigma_max: float | None = None, sigma_min: float | None = None) -> NoiseSchedule:
        """The levels of this schedule in a range: the two ends of the range, and all levels between them.

        Args:
            sigma_max: the highest level, in the units of the data, within the range of this schedule up to rounding in
                float32; None is its highest level.
            sigma_min: the lowest level, within the range of this schedule, below ``sigma_max``; None is its lowest
                level.

        Raises:
            ValueError: if a level is outside the range of this schedule, or ``sigma_min`` is not below ``sigma_max``.

        Example:
            >>> list(NoiseSchedule([8.0, 4.0, 2.0, 1.0]).between(5, 2))
            [5.0, 4.0, 2.0]
        """
        high, low = (
            end if given is None or math.isclose(given, end, rel_tol=_ROUNDING) else given
            for given, end in ((sigma_max, self.sigma_max), (sigma_min, self.sigma_min))
        )
        if (high, low) == (self.sigma_max, self.sigma_min):
            return self
        for name, sigma in (("sigma_max", high), ("sigma_min", low)):
            if not self.sigma_min <= sigma <= self.sigma_max:
                raise ValueError(
                    f"{argument(name)} must be in the range of the schedule, {self.sigma_min:.4g} to "
                    f"{self.sigma_max:.4g}, got {sigma:.4g}. Pass a schedule for levels outside this range."
                )
        _check_range(high, low)
        return NoiseSchedule([high, *(sigma for sigma in self._values if low < sigma < high), low])

    # -- The levels ---------------------------------------------------------------------------------------------------

    @property
    def sigmas(self) -> Tensor:
        """The levels, (L,) float64 on the CPU, the highest first. Changing this copy does not change the schedule."""
        return torch.tensor(self._values, dtype=torch.float64, device="cpu")

    @property
    def sigma_max(self) -> float:
        """The highest level, in the units of the data."""
        return self._values[0]

    @property
    def sigma_min(self) -> float:
        """The lowest level, in the units of the data."""
        return self._values[-1]

    @property
    def smallest_ratio(self) -> float:
        """The smallest ratio of a level to the one before, where the gap is widest; 1 for a schedule of one level."""
        return min((low / high for high, low in itertools.pairwise(self)), default=1.0)

    def position(self, sigma: float | Tensor) -> Tensor:
        """The position of a noise level in the schedule: its fractional index, linear in log sigma.

        Args:
            sigma: noise levels of any shape, positive; levels outside the schedule are clamped to its ends.

        Returns:
            The positions, of sigma's shape, in [0, L - 1], where 0 is the highest level; float64 if sigma is a float or
            a float64 tensor, float32 otherwise. For a level of the schedule, rounded to that dtype, the position is
            exactly its index.

        Example:
            >>> NoiseSchedule([1.0, 0.1, 0.01]).position(0.1)
            tensor(1., dtype=torch.float64)
        """
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor(sigma, dtype=torch.float64, device="cpu")
        dtype = torch.promote_types(sigma.dtype, torch.float32)
        sigma = sigma.to(dtype)
        table = self._table(sigma.device, dtype)
        if len(self) == 1:
            return torch.zeros_like(sigma)
        # The signs make the values ascending, as searchsorted needs them. At a level of the schedule sigma / above is
        # exactly 1 and its logarithm 0; a difference of two logarithms would not be exactly 0.
        lower = (torch.searchsorted(-table, -sigma.contiguous(), right=True) - 1).clamp(0, len(self) - 2)
        above, below = table.take(lower), table.take(lower + 1)  # table[lower] would copy a 0-d index to the CPU
        # The last two levels may be equal after rounding; the clamp avoids 0 / 0.
        width = torch.log(below / above).clamp(max=-torch.finfo(dtype).tiny)
        return lower + (torch.log(sigma / above) / width).clamp(0, 1)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key in self._tables:
            return self._tables[key]
        table = self.sigmas.to(dtype).to(device)  # cast first: not every device has float64
        if type(table) is Tensor:  # torch.export computes with tensors without values
            self._tables[key] = table
        return table

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
        return NoiseSchedule, (self._values,)  # without the tables

    def to_dict(self) -> dict[str, list[float]]:
        """The levels as a dict for JSON, ``{"sigmas": [...]}``, from which ``from_dict`` restores the same schedule."""
        return {"sigmas": list(self._values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """Restores a schedule from the result of ``to_dict``."""
        if not isinstance(values, Mapping) or set(values) != {"sigmas"}:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise ValueError(f'a schedule must be a dict {{"sigmas": [...]}}, got {found!r}.')
        return cls(values["sigmas"])

    # -- Training and sampling ----------------------------------------------------------------------------------------

    def sample(
        self, n: int, *, generator: torch.Generator | int | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Draws noise levels for training, uniformly from the levels of the schedule.

        Args:
            n: the number of noise levels to draw, at least 1.
            generator: a ``torch.Generator``, or a seed; None is torch's global generator. The levels are drawn on the
                generator's device and then moved.
            device: the device of the result; None is the generator's device, or the CPU without a generator.

        Returns:
            The levels (n,), float32, in the units of the data.
        """
        check_count("n", n)
        generator = single_generator(generator)
        source = torch.device("cpu") if generator is None else generator.device
        index = torch.randint(len(self), (n,), generator=generator, device=source)
        target = source if device is None else torch.device(device)
        return self._table(target, torch.float32)[index.to(target)]

    def suggest_step_size(self, steps_per_level: int) -> float:
        r"""The step size of annealed Langevin dynamics, by technique 4 of NCSNv2.

        Let :math:`a = \epsilon/\sigma_L^2` and :math:`b = 2a/(1-(1-a)^2)`. If a chain enters level i with the variance
        :math:`\sigma_{i-1}^2`, its variance after T steps is :math:`(1-a)^{2T} (\gamma^2 - b) + b` times
        :math:`\sigma_i^2`. This factor is above one for every a; the result is the epsilon at which it is smallest. A
        schedule that is not geometric is replaced by the geometric one of the same range and length. For a single level
        the step size is :math:`0.1\,\sigma^2`.

        Args:
            steps_per_level: T, at least 1.

        Returns:
            epsilon, in units of sigma squared, in the convention of Song & Ermon (2020): a step at level i is
            ``x + a score + sqrt(2 a) z`` with ``a = epsilon sigma_i^2 / sigma_L^2``.
        """
        check_count("steps_per_level", steps_per_level)
        if len(self) == 1:
            return _SINGLE_LEVEL_STEP * self.sigma_min**2
        a = math.exp(_minimize(lambda log_a: self._level_variance(math.exp(log_a), steps_per_level), -25.0, 0.0))
        return a * self.sigma_min**2

    def level_variance(self, step_size: float, steps_per_level: int) -> float:
        r"""The variance after the steps at level i by technique 4, in units of :math:`\sigma_i^2`; ideally it is 1.

        It is :math:`q (\gamma^2 - b) + b` with :math:`q = (1-a)^{2T}` (see ``suggest_step_size``), for a chain that
        enters the level with the variance :math:`\sigma_{i-1}^2`. ``chain_variance`` is the variance at the end of a
        long schedule.

        Args:
            step_size: epsilon, between 0 and :math:`2 \sigma_L^2`.
            steps_per_level: T, at least 1.
        """
        check_count("steps_per_level", steps_per_level)
        return self._level_variance(self._a(step_size), steps_per_level)

    def chain_variance(self, step_size: float, steps_per_level: int) -> float:
        r"""The variance at the end of a long schedule, in units of :math:`\sigma_L^2`.

        A chain enters each level with the excess variance of the level before. Over many levels the recursion of
        technique 4 converges to :math:`b (1-q) / (1 - q \gamma^2)` with :math:`q = (1-a)^{2T}`. The result is infinite
        if :math:`q \gamma^2 \ge 1`: the chain then cannot follow the schedule. The published settings for CIFAR-10 give
        1.13.

        Args:
            step_size: epsilon, between 0 and :math:`2 \sigma_L^2`.
            steps_per_level: T, at least 1.
        """
        check_count("steps_per_level", steps_per_level)
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
        """gamma, the geometric mean of the ratios of neighboring levels."""
        return (self.sigma_max / self.sigma_min) ** (1 / max(1, len(self) - 1))

    def _level_variance(self, a: float, steps: int) -> float:
        q = (1 - a) ** (2 * steps)
        return q * self._ratio**2 + (1 - q) / (1 - a / 2)  # b = 1 / (1 - a / 2)


def _check_range(sigma_max: float, sigma_min: float) -> None:
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ValueError(f"expected sigma_max > sigma_min > 0, got sigma_max={sigma_max!r}, sigma_min={sigma_min!r}.")


def _check_values(data: Tensor, value_range: tuple[float, float] | None) -> None:
    low, high = (float(value) for value in data.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images must be finite, got NaN or infinity.")
    if value_range is not None and is_outside(low, high, value_range):
        raise ValueError(
            f"images must have values in [{value_range[0]:g}, {value_range[1]:g}], got values from {low:.3g} to "
            f"{high:.3g}. Write (images + 1) / 2 for images in [-1, 1], images / 255 for 8-bit values, or "
            "value_range=None for data without a range."
        )


def _largest_distance(points: Tensor) -> float:
    """The largest Euclidean distance between two of the points (N, D)."""
    mean, wide = points.mean(0), torch.promote_types(points.dtype, torch.float32)

    def block(start: int) -> Tensor:
        # cdist uses a matrix product, which loses digits if the points are far from zero.
        return (points[start : start + _DISTANCE_BLOCK].to(wide) - mean).float()

    best, pair = -1.0, (0, 0)
    for i in range(0, len(points), _DISTANCE_BLOCK):
        rows = block(i)
        for j in range(i, len(points), _DISTANCE_BLOCK):
            distances = torch.cdist(rows, block(j))
            k = int(distances.argmax())
            if float(distances.flatten()[k]) > best:
                best, pair = float(distances.flatten()[k]), (i + k // distances.shape[1], j + k % distances.shape[1])
    # The distance of this pair is computed again in float64.
    return float(torch.linalg.vector_norm(points[pair[0]].cpu().double() - points[pair[1]].cpu().double()))


def _minimize(function: Callable[[float], float], low: float, high: float) -> float:
    """The argument at which a function with a single minimum is minimal, by golden-section search."""
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


def schedule_of(score: object) -> NoiseSchedule | None:
    """The noise levels that a network was trained on; None for a plain function."""
    schedule = attribute(score, "schedule")
    return schedule if isinstance(schedule, NoiseSchedule) else None


def check_schedule(schedule: object) -> None:
    """Raises TypeError if an object is not a NoiseSchedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule must be a NoiseSchedule, got {type(schedule).__name__}. Write NoiseSchedule(sigmas)."
        )
