r"""The singular value decomposition of a linear operator, :math:`A = U S V^\top`.

What is diagonal in the Fourier transform has real coefficients in the orthonormal Hartley transform,
:math:`\mathcal{H} x = \operatorname{Re} \mathcal{F} x - \operatorname{Im} \mathcal{F} x`, which is its own inverse.

References:
    Bracewell, 1983, Discrete Hartley Transform.
    Press et al., 2007, Numerical Recipes, 3rd ed., 2.6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Decomposition(NamedTuple):
    r"""The singular value decomposition of a linear operator, :math:`A = U S V^\top`, as functions of batches.

    The coefficients of y and x, :math:`U^\top y` and :math:`V^\top x`, have the same shape. Singular vectors of x whose
    value is 0 may be left out, so that :math:`V V^\top` is the projection onto the others.

    Attributes:
        values: the singular values s, the diagonal of S, which broadcast to the coefficients; 0 where y is not
            observed.
        coefficients: :math:`V^\top x`.
        sample: :math:`V c`, of the shape of x, for coefficients c.
        measured: :math:`U^\top y`; None if U is the identity. A noise level for each value of y is then one for each
            coefficient.
    """

    values: Tensor
    coefficients: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor], Tensor]
    measured: Callable[[Tensor], Tensor] | None = None


def decompose(a: Tensor, x: Tensor) -> Decomposition:
    """The decomposition of a matrix (M, D) that multiplies flattened samples like x, of D values, in float64."""
    u, values, vt = torch.linalg.svd(a.cpu().double(), full_matrices=False)  # MPS has no float64
    values = torch.where(values > max(a.shape) * torch.finfo(a.dtype).eps * values[0], values, 0)
    u, values, vt = u.to(x), values.to(x), vt.to(x)
    return Decomposition(
        values, lambda x: x.flatten(1) @ vt.T, lambda c: (c @ vt).view(len(c), *x.shape[1:]), lambda y: y.flatten(1) @ u
    )


def hartley(x: Tensor, axes: tuple[int, ...], factor: Tensor | None = None) -> Tensor:
    """The orthonormal Hartley transform of x over some axes, after a product of its Fourier transform with a factor."""
    z = torch.fft.fftn(x, dim=axes, norm="ortho")
    z = z if factor is None else z * factor
    return z.real - z.imag
