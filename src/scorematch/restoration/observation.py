"""An observation: an operator, what it measured, and the noise of the measurement."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from scorematch.core.batches import check_data
from scorematch.core.precision import exact_float32
from scorematch.restoration.operator import Operator

__all__ = ["Observation"]


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
            of the operator is not that of ``measure`` and ``pseudo_inverse``.

    Example:
        >>> from scorematch.restoration import as_operator
        >>> operator = as_operator("gray @ pool:2")
        >>> Observation(operator, operator.measure(torch.rand(1, 3, 32, 32)))
        Observation(Grayscale() @ AveragePool(2), y 1x1x16x16)
    """

    operator: Operator
    y: Tensor
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.operator, Operator):
            raise TypeError(
                f"operator must be an Operator of scorematch.restoration, got {type(self.operator).__name__}. "
                'Write Mask(mask) for a mask, and as_operator("pool:4") for a text.'
            )
        check_data(self.y, "y")
        object.__setattr__(self, "sigma", check_sigma(self.sigma))
        object.__setattr__(self, "operator", self.operator.with_axes(self.y.ndim))
        image = self.operator.pseudo_inverse(self.y)
        if not bool(torch.isfinite(image).all()):
            raise ValueError("y must be finite where it is observed, got NaN or infinite values.")
        try:
            measured = self.operator.measure(image)
        except RuntimeError as error:
            if not self._hint():
                raise
            raise ValueError(
                f"{self.operator!r} cannot measure the image pseudo_inverse(y) of shape {tuple(image.shape)}."
                f"{self._hint()}"
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
        """Checks an operator with a gain c on a measurement: A A^+ y = y, and c |A^+ y|^2 = |y|^2."""
        gain = self.operator.gain
        if gain is None:
            return
        # TF32 could exceed the tolerance. Under autocast y may be in bfloat16, whose tolerance is larger.
        with exact_float32() if y.dtype == self.y.dtype == torch.float32 else nullcontext():
            image = self.operator.pseudo_inverse(y)
            again = self.operator.measure(image)
        size, tolerance = float(y.norm()), max(1e-3, torch.finfo(y.dtype).eps ** 0.5)
        error = float((again - y).norm())
        if max(error, abs(gain**0.5 * float(image.norm()) - size)) > tolerance * size:
            raise ValueError(
                f"the gain and pseudo_inverse of {self.operator!r} do not fit measure: with y = A x and A A^T = c I, "
                "gain is c, and pseudo_inverse(y) is A^T y / c. Correct them, or leave out gain if A A^T is not a "
                "multiple of the identity."
            )

    def _hint(self) -> str:
        if type(self.operator).pseudo_inverse is not Operator.pseudo_inverse:
            return ""
        return " An operator whose measurement has another shape than the image has to define pseudo_inverse."

    def __repr__(self) -> str:
        noise = f", sigma {self.sigma:g}" if self.sigma else ""
        return f"Observation({self.operator!r}, y {'x'.join(map(str, self.y.shape))}{noise})"

    def __len__(self) -> int:
        """The number of observed images; one image is used for any number of samples."""
        return max(len(self.y), len(self.operator))

    def to(self, device: torch.device | str) -> Observation:
        """The observation on a device, with y in float32."""
        return Observation(self.operator.to(device), self.y.detach().to(torch.float32).to(device), self.sigma)


def check_sigma(sigma: float) -> float:
    """The standard deviation of the noise in y as a float; ValueError if it is negative or not finite."""
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma, the standard deviation of the noise in y, must be at least 0, got {sigma!r}.")
    return float(sigma)
