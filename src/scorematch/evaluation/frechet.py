"""The Fréchet distance of features, with its standard error, and its extrapolation; see ``metrics``."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import single_generator
from scorematch.evaluation.accumulate import Moments
from scorematch.evaluation.estimate import Estimate
from scorematch.evaluation.rows import BLOCK, canonical_order, check_features, different_dimensions, double, draw
from scorematch.evaluation.statistics import Statistics

_SIZES = 15  # of subsets, for the extrapolation
_NEGATIVE = 1e-4  # the tolerance for negative eigenvalues of a covariance, relative to the largest
_known: weakref.WeakKeyDictionary[Statistics, _Gaussian] = weakref.WeakKeyDictionary()

Features = Tensor | Statistics


class Extrapolation(NamedTuple):
    r"""Fréchet distances from several numbers of features, and the line :math:`d^2_\infty + c / n` through them.

    Attributes:
        value: the distance for an infinite number of features. It may be slightly negative.
        slope: the constant c of the bias.
        sizes: the numbers of features, ascending; the last one is N, the number of all features.
        distances: the distances to the reference for these sizes; the last one is the distance of all features.
    """

    value: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_distance(features: Features, reference: Features) -> Estimate:
    r"""The squared Fréchet distance between the Gaussians with the means and covariances of two sets of features.

    The distance is biased upward by about c / N; see the module docstring. Its standard error is computed by the delta
    method. Let T be the map that transports the Gaussian of the features to that of the reference, and :math:`x_i = f_i
    - m`. To first order, image i changes the distance by :math:`\psi_i / n`,

    .. math:: \psi_i = 2 (m - m_r)^\top x_i + \lVert x_i \rVert^2 - x_i^\top T x_i - \mathrm{const},

    and the standard error is the standard deviation of :math:`\psi_i`, divided by :math:`\sqrt n`. It holds for n well
    above D. It does not include the bias in n, nor the error of the reference.

    Args:
        features: features of generated images (N, D); or their ``Statistics``, which give no error.
        reference: features or ``Statistics`` of real images. The divisor of covariances is N - 1.

    Returns:
        The distance, at least 0, and its standard error.

    Warns:
        UserWarning: if N is at most D, so that the covariance is singular.

    Raises:
        ValueError: if there are fewer than two features, if the dimensions differ, or if a covariance has negative
            eigenvalues.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
        >>> frechet_distance(a, a + 3).value
        9.0

    References:
        Heusel et al., 2017, arXiv:1706.08500, Eq. 6.
        Rippl, Munk & Sturm, 2016, Limit Laws of the Empirical Wasserstein Distance: Gaussian Distributions,
        arXiv:1507.04090 (the error).
    """
    own, fixed = _gaussian(features), _gaussian(reference)
    _warn_if_singular(own, fixed)
    left, common, _ = torch.linalg.svd(own.common(fixed), full_matrices=False)
    distance = own.distance(fixed, common)
    if isinstance(features, Statistics):
        return Estimate(distance)
    whiten = own.factor.T / own.factor.square().sum(1)  # x @ whiten has the covariance 1
    parts = []
    for block in check_features(features).split(BLOCK):
        x = double(block).cpu() - own.mean
        change = 2 * x @ (own.mean - fixed.mean) + x.square().sum(1)
        parts.append(change - (x @ whiten @ left).square() @ common)
    return Estimate(distance, float(torch.cat(parts).std() / len(features) ** 0.5))


def frechet_extrapolation(
    features: Tensor,
    reference: Features,
    *,
    sizes: Sequence[int] | None = None,
    generator: torch.Generator | int | None = 0,
) -> Extrapolation:
    r"""Extrapolates the squared Fréchet distance to a reference to an infinite number of features.

    A line in 1 / n is fitted by least squares to the distances of random subsets of several sizes, as by Chong &
    Forsyth. The subsets overlap, so the residuals do not show the error of the result.

    Args:
        features: features (N, D) of generated images.
        reference: features or ``Statistics`` of real images.
        sizes: the sizes of the subsets, each above D and at most N; N is added. None is 15 sizes from the larger of
            N / 10 and D + 1 to N, in equal steps.
        generator: the source of the subsets; an int is a seed, None is torch's global generator.

    Raises:
        ValueError: as ``frechet_distance``; if a size is at most D, where the distance is not linear in 1 / n; if there
            are fewer than two sizes; or, without ``sizes``, if N is below 2 (D + 1).

    References:
        Chong & Forsyth, 2020, arXiv:1911.07023, Sec. 4.
    """
    features = check_features(features)
    n, dimension = features.shape
    if sizes is None:
        if n < 2 * (dimension + 1):
            raise ValueError(
                f"the extrapolation needs at least 2 (D + 1) = {2 * (dimension + 1):,} features of {dimension:,} "
                f"dimensions, got {n:,}."
            )
        steps = torch.linspace(max(n // 10, dimension + 1), n, _SIZES, dtype=torch.float64, device="cpu")
        sizes = steps.round().long().tolist()
    sizes = sorted({*(check_count("each of sizes", size) for size in sizes), n})
    if len(sizes) < 2 or sizes[0] <= dimension or sizes[-1] > n:
        raise ValueError(
            f"sizes must be at least two numbers above the dimension {dimension:,} and at most the number of features, "
            f"{n:,}, got {', '.join(map(str, sizes))}."
        )
    fixed, drawing = _gaussian(reference), single_generator(generator)
    _warn_if_singular(fixed)
    order = canonical_order(features)
    distances = [_Gaussian(features[order[draw(n, size, drawing)]]).distance(fixed) for size in sizes]
    inverse = 1 / torch.tensor(sizes, dtype=torch.float64, device="cpu")
    line = torch.stack([torch.ones_like(inverse), inverse], 1)
    fit = torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64, device="cpu")[:, None]).solution
    return Extrapolation(float(fit[0]), float(fit[1]), tuple(sizes), tuple(distances))


class _Gaussian:
    """The mean and a factor of the covariance of features."""

    def __init__(self, source: Features) -> None:
        given = source if isinstance(source, Statistics) else Moments.of([source])
        self.n = given.n
        # On the CPU: the decomposition of a single matrix is not faster on an accelerator.
        self.mean, covariance = given.mean.cpu().double(), given.covariance.cpu().double()
        self.variance = float(covariance.trace())
        values, vectors = torch.linalg.eigh(covariance)
        largest = float(values[-1])
        if float(values[0]) < -_NEGATIVE * largest:
            raise ValueError(
                f"a covariance must have no negative eigenvalues, but its eigenvalues are from {float(values[0]):.3g} "
                f"to {largest:.3g}."
            )
        kept = values > len(values) * torch.finfo(torch.float64).eps * largest
        self.factor = values[kept].sqrt()[:, None] * vectors[:, kept].T

    def common(self, other: _Gaussian) -> Tensor:
        """The product of the factors; the sum of its singular values is the trace of the root."""
        if len(self.mean) != len(other.mean):
            raise different_dimensions(len(self.mean), len(other.mean))
        return self.factor @ other.factor.T

    def distance(self, other: _Gaussian, singular_values: Tensor | None = None) -> float:
        """The squared Fréchet distance. The singular values of ``common`` are computed unless they are passed."""
        if singular_values is None:
            singular_values = torch.linalg.svdvals(self.common(other))
        of_means = float((self.mean - other.mean).square().sum())
        return max(0.0, of_means + self.variance + other.variance - 2 * float(singular_values.sum()))


def _gaussian(source: Features) -> _Gaussian:
    """Returns the Gaussian of a source. That of ``Statistics``, which is often used again, is computed once."""
    if not isinstance(source, Statistics):
        return _Gaussian(source)
    if source not in _known:
        _known[source] = _Gaussian(source)
    return _known[source]


def _warn_if_singular(*gaussians: _Gaussian) -> None:
    for gaussian in gaussians:
        if gaussian.n is not None and gaussian.n <= len(gaussian.mean):
            warnings.warn(
                f"the covariance of {gaussian.n:,} features of {len(gaussian.mean):,} dimensions is singular, and "
                f"the Fréchet distance is strongly biased. Use more than {len(gaussian.mean):,} images, preferably "
                "50,000.",
                stacklevel=3,
            )
