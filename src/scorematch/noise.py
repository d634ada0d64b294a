r"""The ladder of noise levels, from loud to quiet, and how to choose it.

Data are perturbed with Gaussian noise of standard deviation :math:`\sigma_1 > \sigma_2 > \dots > \sigma_L > 0`. A score
network learns all levels at once, and annealed Langevin dynamics descends them: the loud levels connect the modes of
the data, the quiet ones draw the details. Sigma is in the units of the data; for images, which live in [0, 1], 0.01
is 2.55 gray levels of 255.

Song & Ermon (2020) choose a ladder in four steps, all of them here:

1. :math:`\sigma_1` is the largest distance between two training images (``from_data``).
2. The ratio :math:`\gamma = \sigma_{i-1}/\sigma_i` lets neighboring levels overlap. Noise of level i has norm
   :math:`\sqrt{D}\,\sigma_i` with deviation :math:`\sigma_i/\sqrt{2}`, and gamma solves
   :math:`\Phi(\sqrt{2D}(\gamma-1)+3\gamma) - \Phi(\sqrt{2D}(\gamma-1)-3\gamma) = C` (``suggest_levels``).
3. (The network divides its output by sigma: see ``precondition``.)
4. The step size brings the variance after a level, in units of what it should be, nearest to one
   (``suggest_step_size``).

References:
    Song & Ermon, 2020, Improved Techniques for Training Score-Based Generative Models, arXiv:2006.09011.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# A ladder of one level has no ratio from which technique 4 could find a step. At a tenth of sigma^2 the plain step
# leaves 1/(1 - 0.1/2), five percent too much variance.
_SINGLE_LEVEL_STEP = 0.1
_DISTANCE_BLOCK = 2048  # images compared at a time in technique 1


class NoiseSchedule:
    """A ladder of noise levels: an immutable value, equal to every ladder of the same levels.

    Args:
        sigmas: the levels (L,), positive and strictly descending, in the units of the data; a sequence, an array or a
            tensor. Kept in float64.

    Raises:
        ValueError: if the ladder is empty, not one-dimensional, not finite, not positive, or not strictly descending.

    Example:
        >>> schedule = NoiseSchedule.geometric(50, 0.01, levels=232)
        >>> schedule
        NoiseSchedule(232 levels, 50 -> 0.01)
        >>> round(schedule.suggest_step_size(steps_per_level=5), 8)
        6.18e-06
    """

    __slots__ = ("_tables", "_values")
    _values: tuple[float, ...]
    _tables: dict[tuple[torch.device, torch.dtype], Tensor]

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
                f"sigmas must descend strictly from loud to quiet, but level {i} is {array[i]:g} and level {i + 1} is "
                f"{array[i + 1]:g}. Write sorted(set(sigmas), reverse=True)."
            )
        object.__setattr__(self, "_values", tuple(array.tolist()))
        object.__setattr__(self, "_tables", {})

    # -- Ladders ------------------------------------------------------------------------------------------------------

    @classmethod
    def geometric(cls, sigma_max: float, sigma_min: float, levels: int) -> NoiseSchedule:
        """The ladder with a constant ratio between levels.

        Args:
            sigma_max: the loudest level, in the units of the data.
            sigma_min: the quietest level, positive, below ``sigma_max``.
            levels: how many, at least 2.

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
        r"""The ladder with equal steps in :math:`\sigma^{1/\rho}`: few loud levels, many quiet ones.

        At rho = 1 it is linear, as rho grows it becomes geometric; 7 is made for solvers of the probability flow.

        Args:
            sigma_max: the loudest level, in the units of the data.
            sigma_min: the quietest level, positive, below ``sigma_max``.
            levels: how many, at least 2.
            rho: how much closer the quiet levels lie, positive.

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
        r"""The ladder of a DDPM, in the units of images in [0, 1].

        A DDPM scales images of [-1, 1] by :math:`\sqrt{\bar\alpha_t}` and adds noise of variance
        :math:`1 - \bar\alpha_t`, with :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)`. Divided by the scale that
        is noise of deviation :math:`\sqrt{1/\bar\alpha_t - 1}`, and in [0, 1] half of it.

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
        # log1p and expm1: 1/alpha_bar - 1 of the first steps is 1e-4, a difference of two numbers near one.
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
        generator: torch.Generator | None = None,
    ) -> NoiseSchedule:
        """A geometric ladder for a data set, by techniques 1 and 2 of NCSNv2.

        The loudest level is the largest distance between two images, and the ratio follows from their dimension.
        Distances take time quadratic in the number of images, so a random subset stands for a large set.

        Args:
            images: the data (N, ...), floating point, in [0, 1] for images; at least two that differ.
            sigma_min: the quietest level, in the units of the data.
            C: how far neighboring levels overlap, between 0 and 0.997. The paper says about 0.5, which gives 219
                levels for CIFAR-10's range of 50 to 0.01; the authors' published 232 levels correspond to 0.567.
            max_images: how many images are compared at most.
            generator: for the choice of the subset; None takes torch's global one.

        Raises:
            TypeError: for integer images.
            ValueError: for fewer than two images, NaN or infinity, or a range that is empty.
        """
        data = torch.as_tensor(images)
        if not data.is_floating_point():
            raise TypeError(
                f"images must be floating point in [0, 1], got {data.dtype}. Write images / 255 for 8-bit images."
            )
        if data.ndim < 2 or len(data) < 2:
            raise ValueError(f"a ladder needs at least two images (N, ...), got shape {tuple(data.shape)}.")
        _check_count("max_images", max_images, at_least=2)
        data = data.flatten(1).float()
        if len(data) > max_images:
            device = None if generator is None else generator.device
            data = data[torch.randperm(len(data), generator=generator, device=device)[:max_images].to(data.device)]
        if not torch.isfinite(data).all():
            raise ValueError("images contain NaN or infinity; a ladder needs finite data.")
        sigma_max = _largest_distance(data)
        if sigma_max <= sigma_min:
            raise ValueError(
                f"the largest distance between two images is {sigma_max:g}, not above sigma_min={sigma_min:g}: "
                "the images are (nearly) equal, or sigma_min is too large."
            )
        return cls.geometric(sigma_max, sigma_min, cls.suggest_levels(sigma_max, sigma_min, data.shape[1], C=C))

    @staticmethod
    def suggest_levels(sigma_max: float, sigma_min: float, dimension: int, *, C: float = 0.5) -> int:  # noqa: N803
        """The number of levels for a range, by technique 2 of NCSNv2.

        Args:
            sigma_max: the loudest level, in the units of the data.
            sigma_min: the quietest level.
            dimension: the number of values in one image, D = channels x height x width.
            C: how far neighboring levels overlap (see ``from_data``).

        Returns:
            The number of levels, at least 2.

        Raises:
            ValueError: for an empty range, a dimension below 1 or a C outside (0, 0.997).

        Example:
            >>> NoiseSchedule.suggest_levels(50, 0.01, 3 * 32 * 32)
            219
        """
        _check_range(sigma_max, sigma_min)
        _check_count("dimension", dimension)
        top = math.erf(3 / math.sqrt(2))  # C of two equal levels
        if not 0 < C < top:
            raise ValueError(f"C must lie between 0 and {top:.3f}, got {C!r}; the paper's value is about 0.5.")

        def phi(t: float) -> float:
            return 0.5 * (1 + math.erf(t / math.sqrt(2)))

        def overlap(excess: float) -> float:
            shift = math.sqrt(2 * dimension) * excess
            return phi(shift + 3 * (1 + excess)) - phi(shift - 3 * (1 + excess))

        low, high = 0.0, 1.0  # of gamma - 1; the overlap falls as gamma grows, down to one half if D = 1, 2, ...
        while overlap(high) > C and high < 1e6:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if overlap(middle) > C else (low, middle)
        return max(2, 1 + round(math.log(sigma_max / sigma_min) / math.log1p(high)))

    def respaced(self, levels: int) -> NoiseSchedule:
        """The same range with another number of levels, following this ladder's own shape in log sigma.

        Args:
            levels: how many, at least 2 (1 if this ladder has one level).

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
            raise ValueError(f"a ladder of one level has no range to space {levels} levels in.")
        positions = np.linspace(0, len(self) - 1, levels)
        sigmas = np.exp(np.interp(positions, np.arange(len(self)), np.log(self._values)))
        sigmas[0], sigmas[-1] = self.sigma_max, self.sigma_min
        return NoiseSchedule(sigmas)

    # -- What it says of itself ---------------------------------------------------------------------------------------

    @property
    def sigmas(self) -> Tensor:
        """The levels, (L,) float64 on the CPU, loud to quiet. A copy: the schedule itself does not change."""
        return torch.tensor(self._values, dtype=torch.float64)

    @property
    def sigma_max(self) -> float:
        """The loudest level, in the units of the data."""
        return self._values[0]

    @property
    def sigma_min(self) -> float:
        """The quietest level, in the units of the data."""
        return self._values[-1]

    def position(self, sigma: float | Tensor) -> Tensor:
        """Where a noise level lies in the ladder: its fractional index, linear in log sigma.

        Args:
            sigma: noise levels of any shape, positive; beyond the ladder's ends they are clamped.

        Returns:
            The positions, of sigma's shape, in [0, L - 1], 0 being the loudest. Float32, or float64 where sigma is a
            float or a float64 tensor. A level of the ladder, rounded to sigma's precision, gives its index exactly.

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
        # The table ascends in -sigma. Logarithms of ratios, not differences of logarithms: at a level the ratio is
        # exactly 1.
        lower = (torch.searchsorted(-table, -sigma.contiguous(), right=True) - 1).clamp(0, len(self) - 2)
        above, below = table[lower], table[lower + 1]
        return lower + (torch.log(sigma / above) / torch.log(below / above)).clamp(0, 1)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key not in self._tables:
            self._tables[key] = self.sigmas.to(dtype).to(device)  # cast on the host: MPS has no float64
        return self._tables[key]

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, level: int) -> float:
        return self._values[level]

    def __iter__(self) -> Iterator[float]:
        return iter(self._values)

    def __eq__(self, other: object) -> bool:
        return self._values == other._values if isinstance(other, NoiseSchedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        if len(self) == 1:
            return f"NoiseSchedule(1 level, {self.sigma_max:.3g})"
        return f"NoiseSchedule({len(self)} levels, {self.sigma_max:.3g} -> {self.sigma_min:.3g})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a NoiseSchedule does not change; make a new one.")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[NoiseSchedule], tuple[tuple[float, ...]]]:
        return NoiseSchedule, (self._values,)  # copies and pickles without the tables

    def to_dict(self) -> dict[str, list[float]]:
        """The ladder as plain numbers for JSON; ``from_dict`` restores it bit for bit."""
        return {"sigmas": list(self._values)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSchedule:
        """The ladder that ``to_dict`` wrote.

        Raises:
            ValueError: if the keys are others, or the levels are not a ladder.
        """
        if not isinstance(values, Mapping) or set(values) != {"sigmas"}:
            found = sorted(values) if isinstance(values, Mapping) else values
            raise ValueError(f'a schedule is written {{"sigmas": [...]}}, got {found!r}.')
        return cls(values["sigmas"])

    # -- Training and sampling ----------------------------------------------------------------------------------------

    def sample(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Noise levels for training, drawn uniformly over the levels.

        Args:
            n: how many.
            generator: None takes torch's global one. Drawn on the generator's device, then moved.
            device: where the result lies; None is the generator's device, or the CPU.

        Returns:
            The levels (n,), float32, in the units of the data.

        Raises:
            TypeError, ValueError: if n is not an integer of at least 1.
        """
        _check_count("n", n)
        source = torch.device("cpu") if generator is None else generator.device
        index = torch.randint(len(self), (n,), generator=generator, device=source)
        target = source if device is None else torch.device(device)
        return self._table(target, torch.float32)[index.to(target)]

    def suggest_step_size(self, steps_per_level: int) -> float:
        r"""The step size of annealed Langevin dynamics, by technique 4 of NCSNv2.

        With :math:`a = \epsilon/\sigma_L^2` and :math:`b = 2a/(1-(1-a)^2)`, the variance after T steps at a level,
        entered from the exact law of the level before, is :math:`(1-a)^{2T} (\gamma^2 - b) + b` in units of the
        level's own. It is above one for every a; epsilon makes it least. A ladder that is not geometric counts with
        its mean log ratio; for a single level the step is a fixed fraction, 0.1, of :math:`\sigma^2`.

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

        :math:`q (\gamma^2 - b) + b` with :math:`q = (1-a)^{2T}`, for a chain that enters the level from the exact law
        of the one before. One is right; ``chain_variance`` says what a whole ladder does.
        """
        _check_count("steps_per_level", steps_per_level)
        return self._level_variance(self._a(step_size), steps_per_level)

    def chain_variance(self, step_size: float, steps_per_level: int) -> float:
        r"""The variance at the end of a whole long ladder, in units of :math:`\sigma_L^2`.

        Each level inherits the excess of the one before; the fixed point of technique 4's recursion is
        :math:`b (1-q) / (1 - q \gamma^2)` with :math:`q = (1-a)^{2T}`. Infinite where the chain cannot follow its
        ladder, :math:`q \gamma^2 \ge 1`. The published CIFAR-10 settings give 1.13.
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
                f"step_size must lie between 0 and 2 sigma_min^2 = {2 * self.sigma_min**2:.3g}, got {step_size!r}."
            )
        return a

    @property
    def _ratio(self) -> float:
        """gamma, the mean ratio of neighboring levels."""
        return (self.sigma_max / self.sigma_min) ** (1 / max(1, len(self) - 1))

    def _level_variance(self, a: float, steps: int) -> float:
        q = (1 - a) ** (2 * steps)
        return q * self._ratio**2 + (1 - q) / (1 - a / 2)  # b = 1 / (1 - a / 2)


def own(net: object, name: str) -> Any:
    """What a network says of itself, also inside DistributedDataParallel and its like; None where it does not."""
    inner = getattr(net, "module", None) if isinstance(net, nn.Module) else None
    return getattr(net, name, getattr(inner, name, None))


def own_schedule(net: object) -> NoiseSchedule | None:
    """The ladder that a network carries; None for a plain callable."""
    schedule = own(net, "schedule")
    return schedule if isinstance(schedule, NoiseSchedule) else None


def own_middle(net: object) -> float:
    """The middle of the range of a network's data, around which noise of the loudest level lies; 0 without a range."""
    value_range = own(net, "value_range")
    return 0.0 if value_range is None else (value_range[0] + value_range[1]) / 2


def expand(coefficient: Tensor | float, x: Tensor) -> Tensor | float:
    """A number or () as it is, (N,) with as many axes as x (N, ...), so that it multiplies image by image."""
    if not isinstance(coefficient, Tensor) or coefficient.ndim == 0:
        return coefficient
    return coefficient.view(-1, *[1] * (x.ndim - 1))


def standard_normal(
    shape: Sequence[int],
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Noise of a shape, drawn on the generator's device and then moved, so that one seed is the same noise anywhere.

    None is torch's global generator of the device; a sequence holds one generator for each entry of the first axis.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(
                f"a list of generators holds one for each of the {shape[0]} samples, got {len(generator)}."
            )
        return torch.stack([standard_normal(shape[1:], one, device, dtype) for one in generator])
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)


def _check_range(sigma_max: float, sigma_min: float) -> None:
    if not (math.isfinite(sigma_max) and 0 < sigma_min < sigma_max):
        raise ValueError(f"expected sigma_max > sigma_min > 0, got sigma_max={sigma_max!r}, sigma_min={sigma_min!r}.")


def _check_count(name: str, value: int, *, at_least: int = 1) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def _largest_distance(points: Tensor) -> float:
    """The largest Euclidean distance between two of the points (N, D)."""
    best, pair = -1.0, (0, 0)
    for i in range(0, len(points), _DISTANCE_BLOCK):
        for j in range(i, len(points), _DISTANCE_BLOCK):
            distances = torch.cdist(points[i : i + _DISTANCE_BLOCK], points[j : j + _DISTANCE_BLOCK])
            k = int(distances.argmax())
            if float(distances.flatten()[k]) > best:
                best, pair = float(distances.flatten()[k]), (i + k // distances.shape[1], j + k % distances.shape[1])
    # cdist goes through a matrix product and loses digits; the winning pair is measured once more.
    return float(torch.linalg.vector_norm(points[pair[0]].cpu().double() - points[pair[1]].cpu().double()))


def _minimize(function: Callable[[float], float], low: float, high: float) -> float:
    """The argument at which a function with one minimum is least, by golden sections."""
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
