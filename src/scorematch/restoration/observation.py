"""An observation: an operator, what it measured, and the noise of the measurement."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from scorematch.core.precision import exact_float32
from scorematch.restoration.operators import (
    Operator,
)


@dataclass(frozen=True, eq=False)
class Observation:
    r"""A measurement of one image, or of each image of a batch: :math:`y = A x_0 + \sigma_y n`.

    Args:
        operator: the operator A.
        y: the measurement (N, ...), floating point, of the shape that ``operator.measure`` returns; a batch of 1 is
            used for any number of samples. Values that a mask hides are ignored and may be NaN.
        sigma: the standard deviation sigma_y of the noise in y, in the units of y, such as those of images in [0, 1];
            0 is no noise.

    Raises:
        TypeError: if ``operator`` is not an ``Operator``, or y is not a floating-point tensor.
        ValueError: if sigma is negative, y does not fit the operator, y is not finite where it is observed, or the gain
            of the operator is not that of ``measure`` and ``lift``.

    Example:
        >>> from scorematch.restoration import AveragePool, Grayscale
        >>> x = torch.rand(1, 3, 32, 32)
        >>> Observation(Grayscale() @ AveragePool(2), (Grayscale() @ AveragePool(2)).measure(x))
        Observation(Grayscale() @ AveragePool(2), y 1x1x16x16)
    """

    operator: Operator
    y: Tensor
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"operator must be an Operator of scorematch.restoration, got {type(self.operator).__name__}. "
                "Write Mask(seen) for a mask."
            )
        if not isinstance(self.y, Tensor):
            kind = type(self.y).__name__
            raise TypeError(f"y must be a floating-point tensor, got {kind}. Write torch.as_tensor(y).")
        if not self.y.is_floating_point():
            raise TypeError(f"y must be a floating-point tensor, got {self.y.dtype}. Write y / 255 for 8-bit images.")
        if self.y.ndim < 2 or len(self.y) == 0:
            raise ValueError(f"y must be a batch (N, ...) with at least one image, got shape {tuple(self.y.shape)}.")
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(
                f"sigma, the standard deviation of the noise in y, must be at least 0, got {self.sigma!r}."
            )
        object.__setattr__(self, "sigma", float(self.sigma))
        object.__setattr__(self, "operator", self.operator.with_axes(self.y.ndim))
        lifted = self.operator.lift(self.y)
        if not bool(torch.isfinite(lifted).all()):
            raise ValueError("y must be finite where it is observed, got NaN or infinite values.")
        try:
            measured = self.operator.measure(lifted)
        except RuntimeError as error:
            if not self._hint():
                raise
            raise ValueError(
                f"{self.operator!r} cannot measure the image lift(y) of shape {tuple(lifted.shape)}.{self._hint()}"
            ) from error
        if measured.shape[1:] != self.y.shape[1:]:
            raise ValueError(
                f"y must have shape {tuple(measured.shape[1:])} for each image, the result of {self.operator!r}, got "
                f"{tuple(self.y.shape[1:])}.{self._hint()}"
            )
        if len({len(self.operator), len(self.y)} - {1}) > 1:
            raise ValueError(f"y must have {len(self.operator)} images, like the operator, got {len(self.y)}.")
        self._check_gain(measured.detach())

    def _check_gain(self, y: Tensor) -> None:
        """Checks an operator with a gain c on a measurement: A lift(y) = y, and c |lift(y)|^2 = |y|^2."""
        gain = self.operator.gain
        if gain is None:
            return
        # TF32 could exceed the tolerance. Under autocast y may be in bfloat16, whose tolerance is larger.
        with exact_float32() if y.dtype == self.y.dtype == torch.float32 else nullcontext():
            lifted = self.operator.lift(y)
            again = self.operator.measure(lifted)
        size, tolerance = float(y.norm()), max(1e-3, torch.finfo(y.dtype).eps ** 0.5)
        error = float((again - y).norm())
        if max(error, abs(gain**0.5 * float(lifted.norm()) - size)) > tolerance * size:
            raise ValueError(
                f"the gain and lift of {self.operator!r} do not fit measure: with y = A x and A A^T = c I, gain is c, "
                "and lift(y) is A^T y / c. Correct them, or leave out gain if A A^T is not a multiple of the identity."
            )

    def _hint(self) -> str:
        own = type(self.operator).lift is not Operator.lift
        return "" if own else " An operator whose measurement has another shape than the image has to define lift."

    def __repr__(self) -> str:
        noise = f", sigma {self.sigma:g}" if self.sigma else ""
        return f"Observation({self.operator!r}, y {'x'.join(map(str, self.y.shape))}{noise})"

    def __len__(self) -> int:
        """The number of observed images; one image is used for any number of samples."""
        return max(len(self.y), len(self.operator))

    def to(self, device: torch.device | str) -> Observation:
        """The observation on a device, with y in float32."""
        return Observation(self.operator.to(device), self.y.detach().to(torch.float32).to(device), self.sigma)
