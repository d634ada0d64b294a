"""The forward operators of deepinv as operators of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scorematch.restoration.operator import Operator

__all__ = ["Physics"]


class Physics(Operator):
    """A ``physics`` object of deepinv, without its noise: ``A`` measures, and ``A_adjoint`` is used if it is linear.

    Args:
        physics: a ``deepinv.physics.Physics``; it is linear if it is a ``LinearPhysics``, which has ``A_adjoint``. It
            computes in float32, and its tensors are on the device on which samples are drawn.

    Raises:
        TypeError: if it has no method ``A``.

    Example:
        >>> class Half:  # in place of a deepinv.physics.LinearPhysics
        ...     A = A_adjoint = staticmethod(lambda x: x / 2)
        >>> Physics(Half()).measure(torch.ones(1, 2))
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, physics: Any) -> None:
        if not callable(getattr(physics, "A", None)):
            raise TypeError(
                f"physics must be a deepinv.physics.Physics with the method A, got {type(physics).__name__}."
            )
        self.physics = physics
        self.linear = callable(getattr(physics, "A_adjoint", None))

    def __repr__(self) -> str:
        return f"Physics({type(self.physics).__name__})"

    def measure(self, x: Tensor) -> Tensor:
        """The measurement ``A(x)``."""
        y: Tensor = self.physics.A(x.float())
        return y.to(x.dtype)

    def adjoint(self, y: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """``A_adjoint(y)``."""
        x: Tensor = self.physics.A_adjoint(y.float())
        return x.to(y.dtype)

    def sample_shape(self, y: Tensor) -> tuple[int, ...] | None:
        """The shape that ``A_adjoint`` returns, if the operator is linear."""
        with torch.no_grad():
            return tuple(self.adjoint(torch.zeros_like(y)).shape[1:]) if self.linear else None
