r"""Linear operators for samples of any shape: a function, or a matrix.

References:
    Press et al., 2007, Numerical Recipes, 3rd ed., 2.6 (the singular value decomposition of a matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scorematch.restoration.decomposition import Decomposition, decompose
from scorematch.restoration.operator import Operator, kind_of

__all__ = ["Linear", "Matrix"]


def in_own_dtype(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The values of a function at x, in x's dtype.

    Samplers compute in float32, and exact posteriors in float64. If the function fails since its own tensors have the
    other one of the two dtypes, it is computed in that one.
    """
    try:
        return function(x)
    except RuntimeError:
        try:
            return function(x.to(torch.float64 if x.dtype == torch.float32 else torch.float32)).to(x)
        except (RuntimeError, TypeError):  # TypeError on a device without float64
            pass
        raise


class Linear(Operator):
    """A linear function as an operator; its adjoint is computed by automatic differentiation.

    Args:
        function: a differentiable function of samples (N, ...) that is linear, row by row, without a constant term.

    Raises:
        TypeError: if ``function`` is not callable.

    Example:
        >>> slopes = Linear(lambda x: x[..., 1:] - x[..., :-1])
        >>> slopes.measure(torch.tensor([[1.0, 3.0, 4.0]]))
        tensor([[2., 1.]])
        >>> slopes.adjoint(torch.tensor([[1.0, 0.0]]), shape=(3,))
        tensor([[-1.,  1.,  0.]])
    """

    linear = True

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        if not callable(function):
            raise TypeError(f"function must be a function of a batch of samples, got {type(function).__name__}.")
        self.function = function

    def __repr__(self) -> str:
        return f"Linear({getattr(self.function, '__name__', type(self.function).__name__)})"

    def measure(self, x: Tensor) -> Tensor:
        """The values of the function."""
        return in_own_dtype(self.function, x)


class Matrix(Operator):
    """The product of a matrix with the flattened sample.

    Args:
        a: the matrix (M, D), floating point, for samples of D values.

    Raises:
        TypeError: if a is not a floating-point matrix.
        ValueError: if its values are not finite.

    Example:
        >>> Matrix(torch.eye(2, 4)).measure(torch.arange(4.0).view(1, 1, 2, 2))
        tensor([[0., 1.]])
    """

    linear = True

    def __init__(self, a: Tensor) -> None:
        if not isinstance(a, Tensor) or not a.is_floating_point() or a.ndim != 2:
            raise TypeError(f"a must be a floating-point matrix (M, D), got {kind_of(a)}.")
        if not bool(torch.isfinite(a).all()):
            raise ValueError("a must be finite, got NaN or infinite values.")
        self.a: Tensor = a.detach().clone()

    def __repr__(self) -> str:
        return f"Matrix({self.a.shape[0]}x{self.a.shape[1]})"

    def measure(self, x: Tensor) -> Tensor:
        """The measurement (N, M)."""
        if x[0].numel() != self.a.shape[1]:
            raise ValueError(f"{self!r} needs samples of {self.a.shape[1]} values, got shape {tuple(x.shape[1:])}.")
        return x.flatten(1) @ self.a.T.to(x)

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """The product with the transposed matrix, (N, D), or of the shape of the samples."""
        if y.shape[1:] != self.a.shape[:1]:
            raise ValueError(f"y of {self!r} must have shape ({len(self.a)},), got {tuple(y.shape[1:])}.")
        return (y @ self.a.to(y)).view(len(y), *((-1,) if shape is None else shape))

    def decomposition(self, x: Tensor) -> Decomposition:
        """That of the matrix, of any size."""
        return decompose(self.a, x)

    def to(self, device: torch.device | str) -> Matrix:
        """The matrix on a device."""
        return Matrix(self.a.to(device))
