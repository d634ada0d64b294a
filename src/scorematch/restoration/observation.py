"""An observation: an operator, what it measured, and the noise of the measurement."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import TypeAlias

import torch
from torch import Tensor

from scorematch.core.arguments import check_value
from scorematch.core.batches import check_data
from scorematch.core.precision import exact_float32
from scorematch.core.randomness import standard_normal
from scorematch.core.schema import Field
from scorematch.restoration.linear import Linear, in_own_dtype
from scorematch.restoration.operator import Operator, kind_of
from scorematch.restoration.operators import Mask

__all__ = ["Observation"]

Noise: TypeAlias = float | Tensor | Callable[[Tensor], Tensor]

_TOLERANCE = 1e-3  # of the checks of an operator, relative
_SAME = 1e-5  # the largest relative difference of noise levels that are the same, with rounding
_PROBES = 8  # random samples that show how an operator scales
_LARGEST = 1e18  # noise level with a square in float32; more is no measurement, and less than 1e-18 is no noise


@dataclass(frozen=True, eq=False)
class Observation:
    r"""A measurement of one sample, or of each sample of a batch: :math:`y = A(x_0) + n` with normal noise n.

    Args:
        operator: the operator A.
        y: the measurement (N, ...), floating point, of the shape that ``operator.measure`` returns; a batch of 1 is
            used for any number of samples. Values that are not observed are ignored and may be NaN.
        sigma: the noise of y, in the units of y, such as those of images in [0, 1]. A number: the standard deviation of
            all values; 0 is no noise. A tensor that broadcasts to y: that of each value, where infinity means "not
            measured". A function: the product of a batch like y with the inverse of the covariance, row by row;
            its rows and columns of values that are not observed are left out.

    Attributes:
        shape: the shape of one sample, or None if y does not determine it. A sampler then takes that of the network, or
            that of y.
        mask: which values of y are observed, bool and broadcastable to y; None if all are.

    Raises:
        TypeError: if ``operator`` is not an ``Operator``, y or its measurement is not a floating-point tensor, or sigma
            is of another type.
        ValueError: if sigma is negative, NaN, of another shape, a number above 1e18 or, as a function, not the product
            with the inverse of a covariance; if y does not fit the operator, or is not finite where it is observed; or
            if the operator fails a check on random values: it is not linear although it says so, its gain or its
            adjoint is wrong, it mixes the samples of a batch, or it changes x in place.

    Example:
        >>> from scorematch.restoration import as_operator
        >>> operator = as_operator("gray @ pool:2")
        >>> Observation(operator, operator.measure(torch.rand(1, 3, 32, 32)))
        Observation(Grayscale() @ AveragePool(2), y 1x1x16x16)
    """

    operator: Operator
    y: Tensor
    sigma: Noise = 0.0
    shape: tuple[int, ...] | None = field(init=False, default=None)
    mask: Tensor | None = field(init=False, default=None)
    _unit: Tensor | None = field(init=False, default=None)  # the t of ``scaled``

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"operator must be an Operator of scorematch.restoration, got {type(self.operator).__name__}. "
                'Write Mask(mask) for a mask, and as_operator("pool:4") for a text.'
            )
        check_data(self.y, "y")
        self._set(operator=self.operator.with_axes(self.y.ndim), sigma=_check_noise(self.sigma, self.y))
        self._check_finite(self.operator.mask_of(self.y))
        self._check_number()
        shape = self.operator.sample_shape(self.y)
        if shape is not None:
            self._check(shape)

    @classmethod
    def from_counts(cls, operator: Operator, counts: Tensor, scale: float = 1.0) -> Observation:
        r"""An observation of counts, such as those of photons: n has a Poisson distribution of mean :math:`c\, A(x_0)`.

        The Poisson likelihood is approximated by a normal one, with :math:`y = (n + \min(n, 1)) / c` and the variance
        :math:`(n + 1) / c^2`. For every mean, the mean of such y, weighted by the inverse variances, is unbiased. The
        likelihood of a single count is close to the exact one from about ten counts on.

        Args:
            operator: the operator A, whose measurements are not negative.
            counts: n (N, ...), at least 0.
            scale: c, the mean count for a measurement of 1, positive.

        Raises:
            TypeError: if ``counts`` is not a tensor of real numbers.
            ValueError: if a count is negative or not finite, or ``scale`` is not positive.

        References:
            Mighell, 1999, Parameter Estimation in Astronomy with Poisson-distributed Data I, arXiv:astro-ph/9903093.
        """
        if isinstance(counts, Tensor) and not (counts.is_floating_point() or counts.is_complex()):
            counts = counts.float()
        check_data(counts, "counts")
        check_value("scale", scale, Field(float, above=0))
        if not bool(((counts >= 0) & counts.isfinite()).all()):
            raise ValueError("counts must be at least 0 and finite, got others or NaN.")
        return cls(operator, (counts + counts.clamp(max=1)) / scale, (counts + 1).sqrt() / scale)

    @classmethod
    def with_gaps(cls, y: Tensor, sigma: float | Tensor, mask: Tensor | None = None) -> Observation:
        """An observation of samples of which some values are missing, in each sample others.

        Args:
            y: (N, ...), floating point, NaN where nothing was measured.
            sigma: the noise of the other values: a number, or a tensor that broadcasts to y.
            mask: bool, broadcastable to y, False where nothing was measured, whatever y is there; None is True
                everywhere.

        Raises:
            TypeError: if y is not a floating-point tensor, or the mask is not a bool tensor.
            ValueError: if a mask has True where y is NaN, or shapes do not fit.

        Example:
            >>> Observation.with_gaps(torch.tensor([[1.0, torch.nan], [2.0, 3.0]]), sigma=0.1).mask
            tensor([[ True, False],
                    [ True,  True]])
        """
        check_data(y, "y")
        seen = ~y.isnan() if mask is None else Mask(mask).mask
        if seen.ndim > y.ndim or any(a not in (1, b) for a, b in zip(seen.shape[::-1], y.shape[::-1], strict=False)):
            raise ValueError(f"mask must broadcast to y of shape {tuple(y.shape)}, got shape {tuple(seen.shape)}.")
        return cls(Mask(seen.expand(y.shape)), y, sigma)

    # -- What restoration methods use ---------------------------------------------------------------------------------

    def of_shape(self, shape: Sequence[int]) -> Observation:
        """The observation of samples of a shape, which is checked.

        Raises:
            ValueError: if the operator or y does not fit samples of this shape.
        """
        if self.shape is not None and tuple(shape) != self.shape:
            raise ValueError(
                f"the observation must be of samples of shape {tuple(shape)}, but {self!r} is of samples of shape "
                f"{self.shape}."
            )
        new = copy.copy(self)
        if new.shape is None:
            new._check(tuple(shape))
        return new

    def scaled(self, ratios: float | Tensor, middle: float | Tensor = 0.0, deviation: float = 1.0) -> Observation:
        """The observation of u for samples x = ratios u, where the ratios are positive and broadcast to x.

        If A(ratios u) = t A(u) with a number t for each value of y, it is that of y / t with the same operator.
        Otherwise the operator is u -> A(ratios u) / t, where t is by how much more A changes with x than with u, near
        samples u with the mean ``middle`` and the standard deviation ``deviation``.
        """
        if not isinstance(ratios, Tensor):
            return self
        operator, inner = self.operator, Linear(lambda u: u * ratios)
        generator, shape = torch.Generator().manual_seed(0), (_PROBES, len(operator), *(self.shape or ()))
        u = standard_normal(shape, generator, self.y.device)
        near = [operator.linearized(place) for place in ratios * (middle + deviation * u.flip(0))]
        plain, scaled = (
            torch.stack([at.forward(each) for at, each in zip(near, r * u, strict=True)]) for r in (1.0, ratios)
        )
        length, square = (each.square().sum((0, 1))[None] for each in (plain, scaled))
        t = ((plain * scaled).sum((0, 1)) / length).nan_to_num(0.0)
        same = (scaled - t * plain).square().sum((0, 1)) <= _TOLERANCE**2 * square
        if not (operator.is_linear and bool(same.all())):
            t = (square / length).sqrt().nan_to_num(0.0)
            operator = Linear(lambda y: y / t) @ operator @ inner
        # Any number for a value that depends on nothing.
        t = torch.where(length > 0, t, t.max() if bool(t.max() > 0) else 1.0)
        new = copy.copy(self)
        operator = operator.with_axes(self.y.ndim).for_samples(self.y.new_zeros((len(self), *(self.shape or ()))))
        new._set(operator=operator, y=self.y / t, sigma=_divided(self.sigma, t), _unit=t)
        return new

    def log_unit(self) -> Tensor:
        """The sum of log t of ``scaled`` over the observed values (N,), by which log p(y / t) exceeds log p(y)."""
        t = torch.ones_like(self.y) if self._unit is None else self._unit.expand_as(self.y)
        return self.observed(t.log()).flatten(1).sum(1)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the measurement of samples of a shape has the shape of y."""
        try:
            measured = self.operator.measure(self.y.new_zeros((max(len(self.y), len(self.operator)), *shape)))
        except (RuntimeError, IndexError, ValueError):
            return False
        return measured.shape[1:] == self.y.shape[1:]

    def rows(self, rows: slice | Tensor) -> Observation:
        """The observation of a slice of the batch, or of the samples with these indices."""

        def part(values: Tensor | None) -> Tensor | None:
            batched = values is not None and values.ndim == self.y.ndim and len(values) > 1
            return values[rows] if batched and values is not None else values

        new = copy.copy(self)
        sigma = part(self.sigma) if isinstance(self.sigma, Tensor) else self.sigma
        new._set(operator=self.operator.rows(rows), y=part(self.y), sigma=sigma, mask=part(self.mask))
        return new

    def residual(self, measured: Tensor) -> Tensor:
        """Y minus a measurement, where y is observed, and 0 elsewhere."""
        return self.observed(self.y - measured)

    def observed(self, values: Tensor) -> Tensor:
        """Values like y, with 0 where y is not observed."""
        return values if self.mask is None else torch.where(self.mask, values, 0)

    def covariance(self, values: Tensor) -> Tensor:
        """The product of values like y with the covariance of the noise, where y is observed, and 0 elsewhere.

        Raises:
            ValueError: if only the product with its inverse is known.
        """
        if callable(self.sigma):
            raise ValueError("sigma is a function, so that only the inverse of the covariance of the noise is known.")
        return self.observed(values * self.sigma**2)

    def precision(self, values: Tensor) -> Tensor:
        """The product with the inverse of the covariance, 0 where y is not observed, and infinite without noise."""
        sigma = self.sigma
        return self.observed(in_own_dtype(sigma, values) if callable(sigma) else values / sigma**2)

    # -- Checks -------------------------------------------------------------------------------------------------------

    def _check_finite(self, mask: Tensor | None) -> None:
        """Checks y where the operator's mask and sigma observe it, which becomes the attribute."""
        measured = self.sigma <= _LARGEST if isinstance(self.sigma, Tensor) else None
        shape = None if mask is None else tuple(mask.shape)
        try:
            if mask is not None and measured is not None:
                measured = mask.to(measured.device) & measured
            self._set(mask=mask if measured is None else measured)
            y = self.residual(torch.zeros_like(self.y))
        except RuntimeError as error:
            raise ValueError(f"a mask of shape {shape} does not fit y of shape {tuple(self.y.shape)}.") from error
        if not bool(torch.isfinite(y).all()):
            raise ValueError("y must be finite where it is observed, got NaN or infinite values.")

    def _check_number(self) -> None:
        if len({len(self.operator), len(self.y)} - {1}) > 1:
            raise ValueError(f"y must have {len(self.operator)} images, like the operator, got {len(self.y)}.")

    def _check(self, shape: tuple[int, ...]) -> None:
        """Checks operator and y for samples of this shape, which becomes the attribute."""
        batch = max(len(self.y), len(self.operator))
        zeros = self.y.new_zeros((batch, *shape))
        try:
            measured = self.operator.measure(zeros)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{self.operator!r} cannot measure samples of shape {shape}: {error}") from error
        if not isinstance(measured, Tensor) or not measured.is_floating_point():
            raise TypeError(f"{self.operator!r} must return a floating-point tensor, got {kind_of(measured)}.")
        if measured.shape[1:] != self.y.shape[1:]:
            raise ValueError(
                f"y must have shape {tuple(measured.shape[1:])} for each image, the result of {self.operator!r}, got "
                f"{tuple(self.y.shape[1:])}."
            )
        self._set(shape=shape, operator=self.operator.for_samples(zeros))
        self._check_number()
        generator = torch.Generator().manual_seed(0)
        u, w = (standard_normal(zeros.shape, generator, zeros.device).to(zeros) for _ in range(2))
        # TF32 could exceed the tolerance. Under autocast a measurement may be in bfloat16.
        with exact_float32() if measured.dtype == self.y.dtype == torch.float32 else nullcontext():
            tolerance = max(_TOLERANCE, torch.finfo(measured.dtype).eps ** 0.5)
            if len(self.operator) == 1:
                self._check_rows(u, w, tolerance)
            if self.operator.is_linear:
                self._check_linear(u, w, tolerance)

    def _check_rows(self, u: Tensor, w: Tensor, tolerance: float) -> None:
        """Checks that the measurement of a sample does not depend on the others in the batch, and x stays as it is."""
        given = u.clone()
        first = self.operator.measure(given)[:1]
        if not torch.equal(given, u):
            raise ValueError(f"{self.operator!r} changes x in place. Write 2 * x in place of x.mul_(2).")
        other = torch.cat([u[:1], w[1:] if len(w) > 1 else w])
        if float((self.operator.measure(other)[:1] - first).norm()) > tolerance * float(first.norm()):
            raise ValueError(
                f"{self.operator!r} mixes the samples of a batch: each row of the measurement must depend on the same "
                "row of x alone. Name the axes of means and norms."
            )

    def _check_linear(self, u: Tensor, w: Tensor, tolerance: float) -> None:
        """Checks on random values that A is linear, that the adjoint is that of A, and that A A^T is c I."""
        operator, generator = self.operator, torch.Generator().manual_seed(1)
        once = operator.measure(u)
        size = _norm(once)
        if not math.isfinite(size):
            raise ValueError(f"{operator!r} must return finite values, got NaN or infinite ones for random samples.")
        if float((operator.measure(2 * u + w) - 2 * once - operator.measure(w)).norm()) > 3 * tolerance * size:
            raise ValueError(
                f"{operator!r} is not linear: A (2 u + w) is not 2 A u + A w. Subtract a constant term from y; for "
                "another operator leave out linear and gain."
            )
        if operator.gain is not None:
            again = operator.measure(operator.pseudo_inverse(once))
            image = _norm(operator.pseudo_inverse(once))
            if not max(float((again - once).norm()), abs(operator.gain**0.5 * image - size)) <= tolerance * size:
                raise ValueError(
                    f"the gain and pseudo_inverse of {operator!r} do not fit measure: with y = A x and A A^T = c I, "
                    "gain is c, and pseudo_inverse(y) is A^T y / c. Correct them, or leave out gain if A A^T is not a "
                    "multiple of the identity."
                )
        v = standard_normal(once.shape, generator, u.device).to(once)
        back = operator.adjoint(v, u.shape[1:])
        if not isinstance(back, Tensor) or back.shape != u.shape:
            raise ValueError(
                f"the adjoint of {operator!r} must return a tensor of the shape of the samples, {tuple(u.shape)}, got "
                f"{kind_of(back)}. Correct it, or leave it out: it is then computed by automatic differentiation."
            )
        if not abs(float((once * v).sum() - (u * back).sum())) <= tolerance * (size * float(v.norm()) + 1e-30):
            raise ValueError(
                f"the adjoint of {operator!r} is not that of measure: the inner products of A u with v and of u with "
                "A^T v differ. Correct it, or leave it out: it is then computed by automatic differentiation."
            )

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        noise = f"{self.sigma:g}" if isinstance(self.sigma, float) else _described(self.sigma)
        shown = "" if noise == "0" else f", sigma {noise}"
        return f"Observation({self.operator!r}, y {'x'.join(map(str, self.y.shape))}{shown})"

    def __len__(self) -> int:
        """The number of observed images; one image is used for any number of samples."""
        return max(len(self.y), len(self.operator))

    def to(self, device: torch.device | str) -> Observation:
        """The observation on a device, with y in float32."""
        new = copy.copy(self)
        y, mask = self.y.detach().to(torch.float32).to(device), None if self.mask is None else self.mask.to(device)
        sigma = self.sigma.to(torch.float32).to(device) if isinstance(self.sigma, Tensor) else self.sigma
        new._set(operator=self.operator.to(device), y=y, sigma=sigma, mask=mask)
        return new


def check_sigma(sigma: float) -> float:
    """The noise level of y as a float, 0 up to 1e-18; ValueError if it is negative, NaN or above 1e18."""
    if not 0 <= sigma <= _LARGEST:
        wanted = "at least 0" if not sigma > 0 else f"at most {_LARGEST:g}"
        raise ValueError(f"sigma, the standard deviation of the noise in y, must be {wanted}, got {sigma!r}.")
    return float(sigma) if sigma > 1 / _LARGEST else 0.0


def _check_noise(sigma: Noise, y: Tensor) -> Noise:
    if isinstance(sigma, Tensor) and (sigma.is_complex() or sigma.dtype == torch.bool):
        raise TypeError(f"sigma must be a tensor of real numbers, got {sigma.dtype}.")
    if isinstance(sigma, Tensor) and sigma.numel() == 1 and bool(sigma.isfinite()):
        sigma = float(sigma)
    if isinstance(sigma, Tensor):
        try:
            fits = torch.broadcast_shapes(sigma.shape, y.shape) == y.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"sigma must broadcast to y of shape {tuple(y.shape)}, got shape {tuple(sigma.shape)}.")
        if not bool((sigma >= 0).all()):
            raise ValueError(
                "sigma, the standard deviation of the noise in y, must be at least 0, got lower ones or NaN."
            )
        return sigma.detach().to(y)
    if callable(sigma):
        _check_precision(sigma, y)
        return sigma
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        raise TypeError(
            "sigma must be a number, a tensor that broadcasts to y, or a function, the product with the inverse of the "
            f"covariance, got {type(sigma).__name__}. Write torch.as_tensor(sigma) for several numbers."
        )
    return check_sigma(sigma)


def _norm(x: Tensor) -> float:
    """The norm from a sum, which is pairwise: ``x.norm()`` is 0.2 % too small for 18 million values in float32."""
    return float(x.square().sum()) ** 0.5


def _check_precision(product: Callable[[Tensor], Tensor], y: Tensor) -> None:
    """Checks on random values that a product is that of a symmetric, positive matrix."""
    generator = torch.Generator().manual_seed(0)
    u, w = (standard_normal(y.shape, generator, y.device).to(y) for _ in range(2))
    try:
        p, q = product(u), product(w)
    except RuntimeError as error:
        raise ValueError(f"sigma, a function, cannot be applied to y of shape {tuple(y.shape)}: {error}") from error
    if not isinstance(p, Tensor) or p.shape != y.shape:
        raise ValueError(f"sigma must return a tensor of the shape of y, {tuple(y.shape)}, got {kind_of(p)}.")
    size = float(p.norm()) * float(w.norm())
    along, between = float((u * p).sum()), abs(float((w * p).sum() - (u * q).sum()))
    if not (along > 0 and between <= max(_TOLERANCE, torch.finfo(y.dtype).eps ** 0.5) * size):  # also true for NaN
        raise ValueError(
            "sigma must be the product with the inverse of a covariance, a symmetric and positive matrix, but that of "
            "random values is not."
        )


def _divided(sigma: Noise, t: Tensor) -> Noise:
    """The noise of y / t for that of y; a number if it is that of all values."""
    if callable(sigma):
        return lambda v: t * sigma(t * v)
    found = sigma / t
    low, high = found.aminmax()
    return float(high) if bool(low >= (1 - _SAME) * high) and bool(high.isfinite()) else found


def _described(sigma: object) -> str:
    return f"of shape {tuple(sigma.shape)}" if isinstance(sigma, Tensor) else "of a covariance"
