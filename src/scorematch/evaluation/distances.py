r"""Distances between two sets of vectors (n, D) and (m, D), without features: for data that are not pictures.

**Energy distance**, the root of :math:`2\, \mathrm{E} |x - y| - \mathrm{E} |x - x'| - \mathrm{E} |y - y'|`, over all
pairs of the two sets. It is zero only for equal distributions.

**Maximum mean discrepancy**, squared: :math:`\mathrm{E}\, k(x, x') + \mathrm{E}\, k(y, y') - 2\, \mathrm{E}\, k(x, y)`
with the kernel :math:`k(x, y) = \exp(-|x - y|^2 / 2 \ell^2)` and the median distance of two vectors of the reference as
:math:`\ell`. Its estimate is unbiased, and may be slightly negative.

**Sliced Wasserstein distance**, the mean over random directions w of the Wasserstein distance of the projections,
:math:`\int |F_{w^\top x}(t) - F_{w^\top y}(t)|\, dt` with their distribution functions F.

**Errors.** Each estimate is, to first order, a mean :math:`\tfrac1n \sum_i h(x_i)` plus :math:`\tfrac1m \sum_j g(y_j)`.
Its standard error is the root of :math:`\mathrm{Var}\, h / n + \mathrm{Var}\, g / m` (delta method).

References:
    Székely & Rizzo, 2013, Energy Statistics: A Class of Statistics Based on Distances, Eq. 5.
    Gretton et al., 2012, A Kernel Two-Sample Test, Eq. 3.
    Bonneel et al., 2015, Sliced and Radon Wasserstein Barycenters of Measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import single_generator, standard_normal
from scorematch.evaluation.estimate import Estimate, root_of
from scorematch.evaluation.rows import BLOCK, double, random_rows, squared_distances
from scorematch.evaluation.statistics import Features, pair_of

_MEDIAN_OF = 1000  # vectors of the reference whose distances give the width of the kernel
_DIRECTIONS = 128


def energy_distance(features: Features, reference: Features) -> Estimate:
    """The energy distance between vectors (N, D) and (M, D), and its standard error.

    For D = 1 it is that of ``scipy.stats.energy_distance``.

    References:
        Székely & Rizzo, 2013, Eq. 5.
    """
    x, y = _centered(features, reference)
    xx, xy, yx, yy = (mean_over(Tensor.sqrt, a, b) for a, b in ((x, x), (x, y), (y, x), (y, y)))
    square = float(2 * xy.mean() - xx.mean() - yy.mean())
    return root_of(Estimate(max(0.0, square), 2 * error_of(xy - xx, yx - yy)))


def maximum_mean_discrepancy(features: Features, reference: Features) -> Estimate:
    """The squared maximum mean discrepancy of vectors (N, D) and (M, D) with a Gaussian kernel, and its standard error.

    References:
        Gretton et al., 2012, Eq. 3.
    """
    x, y = _centered(features, reference)
    some = random_rows(y, min(len(y), _MEDIAN_OF))
    squares = squared_distances(some, some)
    squares = squares[torch.ones_like(squares).triu(1) > 0]
    twice = 2 * (float(squares.median()) or float(squares.mean()) or 1.0)  # more than half of the pairs may be equal

    def others(a: Tensor) -> Tensor:
        """For each vector the mean kernel with the others of its set."""
        return (mean_over(kernel, a, a) * len(a) - 1) / (len(a) - 1)

    def kernel(square: Tensor) -> Tensor:
        return (-square / twice).exp()

    xx, yy, xy, yx = others(x), others(y), mean_over(kernel, x, y), mean_over(kernel, y, x)
    return Estimate(float(xx.mean() + yy.mean() - 2 * xy.mean()), 2 * error_of(xx - xy, yy - yx))


def sliced_wasserstein_distance(
    features: Features,
    reference: Features,
    *,
    directions: int = _DIRECTIONS,
    generator: torch.Generator | int | None = 0,
) -> Estimate:
    """The sliced Wasserstein distance of first order between vectors (N, D) and (M, D), and its standard error.

    Args:
        features: the samples (N, D).
        reference: the data (M, D).
        directions: the number of random directions.
        generator: the source of the directions; an int is a seed, None is torch's global generator.
    """
    x, y = _centered(features, reference)
    check_count("directions", directions)
    w = standard_normal((x.shape[1], directions), single_generator(generator), x.device, torch.float64)
    w = w / w.norm(dim=0)
    value, h, g = wasserstein(x @ w, y @ w)
    return Estimate(float(value.mean()), error_of(h.mean(1), g.mean(1)))


def wasserstein(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The Wasserstein distance of each column of x (n, L) and y (m, L), and its derivatives.

    Returns:
        :math:`\int |F - G|\, dt` (L,); and what each value adds to n or m times it to first order, the Kantorovich
        potential :math:`\int_{x_i}^\infty \mathrm{sign}(F - G)\, dt` (n, L), and minus that of the y (m, L).
    """
    values, order = torch.cat([x, y]).sort(0)
    masses = torch.where(order < len(x), len(y), -len(x))  # times n m, so that equal ones cancel without rounding
    difference, gaps = masses.cumsum(0)[:-1], values.diff(dim=0)
    slopes = torch.cat([difference.sign() * gaps, torch.zeros_like(values[:1])])
    potential = torch.empty_like(values).scatter_(0, order, slopes.flip(0).cumsum(0).flip(0))
    return (difference.abs() * gaps).sum(0) / (len(x) * len(y)), potential[: len(x)], -potential[len(x) :]


def _centered(features: Features, reference: Features) -> tuple[Tensor, Tensor]:
    """The vectors in float64, minus the mean of the reference: smaller norms lose fewer digits to cancellation."""
    x, y = map(double, pair_of(features, reference))
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a distance needs at least 2 vectors in each set, got {len(x)} and {len(y)}.")
    return x - y.mean(0), y - y.mean(0)


def mean_over(function: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """For each vector of a (n, D) the mean over b (m, D) of a function of their squared distance."""
    found = [sum(function(squared_distances(rows, part)).sum(1) for part in b.split(BLOCK)) for rows in a.split(BLOCK)]
    return torch.cat(found) / len(b)  # type: ignore[arg-type]


def error_of(h: Tensor, g: Tensor) -> float:
    """The standard error of the mean of h (n,) plus the mean of g (m,)."""
    return math.sqrt(float(h.var()) / len(h) + float(g.var()) / len(g))
