r"""Metrics of generated images: functions of features, and accumulators of features that arrive in batches.

**Fréchet distance**, of the Gaussians with the means and covariances of two sets of features,

.. math:: d^2 = \lVert m_a - m_b \rVert^2 + \mathrm{tr}\bigl(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2}\bigr) .

With Inception's features it is the FID. Let :math:`S = R^\top R`, where R is computed from the eigenvalues of S that
exceed the rounding error. The trace of the root is the sum of the singular values of :math:`R_a R_b^\top`. It is real,
and accurate for singular covariances as well.

*Bias.* The distance computed from n features is too large by about c / n. The constant c depends on the distribution
and grows with the number of dimensions, so distances from different n are not comparable. ``frechet_extrapolation``
fits :math:`d^2(n) = d^2_\infty + c / n` to several n. It does not remove the bias from a finite reference.

**Kernel distance** (KID), the unbiased estimate of the squared maximum mean discrepancy of the kernel
:math:`k(x, y) = (x^\top y / D + 1)^3`, averaged over random subsets. It has no bias in n and may be slightly negative.

**Inception Score**, :math:`\exp \mathrm{E}_x \mathrm{KL}(p(y|x) \Vert p(y))`, averaged over equal splits. It needs no
reference. With m images per split it is at most m, and biased downward.

**Precision and recall.** The radius of the ball around a feature is the distance to its k-th nearest neighbor in its
own set. Precision is the fraction of generated features in the ball of a real feature, recall the fraction of real
features in the ball of a generated feature. Both depend on the sizes of the sets: report the sizes.

**Density and coverage.** Density is the mean number of balls of real features that contain a generated feature, divided
by k. Coverage is the fraction of the balls of real features that contain a generated feature. For equal distributions,
n real and m generated images, the expected density is 1, and the expected coverage
:math:`1 - \prod_{i=1}^k \frac{n - i}{n + m - i}`.

**Precision and memory.** All computations are in float64, on the device of the features, or on the CPU if the device
does not support float64. Distances between features are computed in blocks of 2,048 x 2,048, which need about 200 MB in
addition to the features, plus 66 MB per 1,024 dimensions. A distance below its rounding error is set to zero, so that
the distance between equal features is exactly zero. A feature at the distance of the radius is inside of the ball.

**Order.** Random subsets and splits are drawn after the features were sorted by a fixed projection. The result
therefore does not depend on the order of the features, or on the process that computed them.

References:
    Heusel et al., 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500 (FID).
    Chong & Forsyth, 2020, Effectively Unbiased FID and Inception Score and Where to Find Them, arXiv:1911.07023.
    Bińkowski et al., 2018, Demystifying MMD GANs, arXiv:1801.01401 (KID).
    Salimans et al., 2016, Improved Techniques for Training GANs, arXiv:1606.03498 (Inception Score).
    Kynkäänniemi et al., 2019, Improved Precision and Recall Metric, arXiv:1904.06991.
    Naeem et al., 2020, Reliable Fidelity and Diversity Metrics for Generative Models, arXiv:2002.09797.
"""

from __future__ import annotations

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import single_generator
from scorematch.evaluation.accumulate import Moments, Rows, check_features, double
from scorematch.evaluation.statistics import Statistics

T = TypeVar("T")
Normal = Tensor | Moments | Statistics
Features = Tensor | Statistics

_BLOCK = 2048  # the number of features on each side of a block of distances
_SIZES = 15  # of subsets, for the extrapolation
_NEGATIVE = 1e-4  # the tolerance for negative eigenvalues of a covariance, relative to the largest
_TIE = 1e-9  # the relative difference up to which squared distances count as equal; it is above their rounding error
_known: weakref.WeakKeyDictionary[Statistics, _Gaussian] = weakref.WeakKeyDictionary()


class Estimate(NamedTuple):
    """A value and its error.

    Attributes:
        value: the value.
        deviation: its standard deviation over subsets or splits, or its standard error; the function says which.
    """

    value: float
    deviation: float


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


# -- Fréchet distance -------------------------------------------------------------------------------------------------


def frechet_distance(a: Normal, b: Normal) -> float:
    """The squared Fréchet distance between the Gaussians with the means and covariances of two sets of features.

    Args:
        a: features (N, D), their ``Moments``, or ``Statistics``. The divisor of covariances is N - 1.
        b: the other set, in the same form or another. The order of the sets does not matter.

    Returns:
        The distance, at least 0. It is biased upward by about c / N; see the module docstring.

    Warns:
        UserWarning: if N is at most D, so that the covariance is singular.

    Raises:
        TypeError: if ``a`` or ``b`` is something else.
        ValueError: if there are fewer than two features, if the dimensions differ, or if a covariance has negative
            eigenvalues.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])  # mean 1, variance 2
        >>> frechet_distance(a, a + 3)
        9.0

    References:
        Heusel et al., 2017, arXiv:1706.08500, Eq. 6.
    """
    first, second = _gaussian(a), _gaussian(b)
    _warn_if_singular(first, second)
    return first.distance(second)


def frechet_estimate(features: Tensor, reference: Normal) -> Estimate:
    r"""The squared Fréchet distance to a reference, and its standard error over the generated images.

    The standard error is computed by the delta method. Let T be the map that transports the Gaussian of the features to
    that of the reference, and :math:`x_i = f_i - m`. To first order, image i changes the distance by
    :math:`\psi_i / n`,

    .. math:: \psi_i = 2 (m - m_r)^\top x_i + \lVert x_i \rVert^2 - x_i^\top T x_i - \mathrm{const},

    and the standard error is the standard deviation of :math:`\psi_i`, divided by :math:`\sqrt n`. It holds for n well
    above D. It does not include the bias in n, nor the error of the reference.

    Args:
        features: features (N, D) of generated images.
        reference: features, ``Moments`` or ``Statistics`` of real images.

    Returns:
        The distance, and its standard error as ``deviation``.

    Warns:
        UserWarning: as ``frechet_distance``.

    Raises:
        TypeError, ValueError: as ``frechet_distance``.

    References:
        Rippl, Munk & Sturm, 2016, Limit Laws of the Empirical Wasserstein Distance: Gaussian Distributions,
        arXiv:1507.04090.
    """
    features = check_features(features)
    own, fixed = _gaussian(features), _gaussian(reference)
    _warn_if_singular(own, fixed)
    left, common, _ = torch.linalg.svd(own.common(fixed), full_matrices=False)
    whiten = own.factor.T / own.factor.square().sum(1)  # x @ whiten has the covariance 1
    parts = []
    for block in features.split(_BLOCK):
        x = double(block).cpu() - own.mean
        change = 2 * x @ (own.mean - fixed.mean) + x.square().sum(1)
        parts.append(change - (x @ whiten @ left).square() @ common)
    return Estimate(own.distance(fixed, common), float(torch.cat(parts).std() / len(features) ** 0.5))


def frechet_extrapolation(
    features: Tensor,
    reference: Normal,
    *,
    sizes: Sequence[int] | None = None,
    generator: torch.Generator | int | None = 0,
) -> Extrapolation:
    r"""Extrapolates the squared Fréchet distance to a reference to an infinite number of features.

    A line in 1 / n is fitted by least squares to the distances of random subsets of several sizes, as by Chong &
    Forsyth. The subsets overlap, so the residuals do not show the error of the result.

    Args:
        features: features (N, D) of generated images.
        reference: features, ``Moments`` or ``Statistics`` of real images.
        sizes: the sizes of the subsets, each above D and at most N; N is added. None is 15 sizes from the larger of
            N / 10 and D + 1 to N, in equal steps.
        generator: the source of the subsets; an int is a seed, None is torch's global generator.

    Returns:
        The extrapolated distance, the slope, and the distance of each size.

    Raises:
        TypeError: as ``frechet_distance``; or if a size is not an integer.
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
        steps = torch.linspace(max(n // 10, dimension + 1), n, _SIZES, dtype=torch.float64)
        sizes = steps.round().long().tolist()
    sizes = sorted({*(check_count("each of sizes", size) for size in sizes), n})
    if len(sizes) < 2 or sizes[0] <= dimension or sizes[-1] > n:
        raise ValueError(
            f"sizes must be at least two numbers above the dimension {dimension:,} and at most the number of features, "
            f"{n:,}, got {', '.join(map(str, sizes))}."
        )
    fixed, drawing = _gaussian(reference), single_generator(generator)
    _warn_if_singular(fixed)
    order = _canonical(features)
    distances = [_Gaussian(features[order[_draw(n, size, drawing)]]).distance(fixed) for size in sizes]
    line = torch.stack([torch.ones(len(sizes)), 1 / torch.tensor(sizes, dtype=torch.float64)], 1)
    fit = torch.linalg.lstsq(line, torch.tensor(distances, dtype=torch.float64)[:, None]).solution
    return Extrapolation(float(fit[0]), float(fit[1]), tuple(sizes), tuple(distances))


class _Gaussian:
    """The mean and a factor of the covariance of features."""

    def __init__(self, source: Normal) -> None:
        if isinstance(source, Tensor):
            moments = Moments()
            moments.update(source)
            source = moments
        if not isinstance(source, Moments | Statistics):
            raise TypeError(
                f"features must be a tensor (N, D), Moments or Statistics, got {type(source).__name__}. Write "
                "torch.as_tensor(...)."
            )
        self.n = source.n
        # On the CPU: the decomposition of a single matrix is not faster on an accelerator.
        self.mean, covariance = source.mean.cpu().double(), source.covariance.cpu().double()
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
            raise ValueError(
                f"both sets of features must have the same dimension, got {len(self.mean)} and {len(other.mean)}. Use "
                "one extractor, and images of one size."
            )
        return self.factor @ other.factor.T

    def distance(self, other: _Gaussian, singular_values: Tensor | None = None) -> float:
        """The squared Fréchet distance. The singular values of ``common`` are computed unless they are passed."""
        if singular_values is None:
            singular_values = torch.linalg.svdvals(self.common(other))
        of_means = float((self.mean - other.mean).square().sum())
        return max(0.0, of_means + self.variance + other.variance - 2 * float(singular_values.sum()))


def _gaussian(source: Normal) -> _Gaussian:
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


# -- Kernel distance --------------------------------------------------------------------------------------------------


def kernel_distance(
    a: Features,
    b: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | int | None = 0,
) -> Estimate:
    """The squared maximum mean discrepancy between two sets of features; with Inception's features, the KID.

    Args:
        a: features (N, D), or ``Statistics`` with features.
        b: features (M, D), or ``Statistics`` with features.
        subsets: the number of pairs of random subsets.
        subset_size: the number of features in each subset, drawn without replacement; at least 2, at most N and M.
        generator: the source of the subsets; an int is a seed, None is torch's global generator.

    Returns:
        The mean and the standard deviation over the subsets. The deviation is that of a single subset, not of the mean.
        It is 0 if each subset is the whole set.

    Raises:
        TypeError: if ``a`` or ``b`` is something else, or a number is not an integer.
        ValueError: if a number is too small, a set has fewer than ``subset_size`` features, or the dimensions differ.

    References:
        Bińkowski et al., 2018, arXiv:1801.01401, Sec. 4 and Eq. 4.
    """
    first, second = _pair(a, b, ("a", "b"))
    check_count("subsets", subsets)
    check_count("subset_size", subset_size, 2)
    least = min(len(first), len(second))
    if subset_size > least:
        raise ValueError(
            f"the kernel distance needs at least subset_size = {subset_size:,} features in each set, got "
            f"{len(first):,} and {len(second):,}. "
            + ("Pass more images." if least < 2 else f"Write subset_size={least} or less.")
        )
    drawing = single_generator(generator)
    orders = [(each, _canonical(each)) for each in (first, second)]
    found = []
    whole = subset_size == len(first) == len(second)
    for _ in range(1 if whole else subsets):
        x, y = (double(each[order[_draw(len(each), subset_size, drawing)]]) for each, order in orders)
        found.append(_discrepancy(x, y))
    values = torch.tensor(found, dtype=torch.float64)
    return Estimate(float(values.mean()), float(values.std(correction=0)))


def _discrepancy(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between features (m, D) and (m, D)."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def others(u: Tensor) -> Tensor:
        products = kernel(u, u)
        return (products.sum() - products.trace()) / (len(u) * (len(u) - 1))

    return float(others(x) + others(y) - 2 * kernel(x, y).mean())


# -- Inception Score --------------------------------------------------------------------------------------------------


def inception_score(logits: Tensor, *, splits: int = 10, generator: torch.Generator | int | None = 0) -> Estimate:
    """The exponential of the mutual information between images and classes.

    Args:
        logits: the logits of the classes (N, K), such as those of ``inception().extract(images)``.
        splits: the number of random parts of N / splits images each.
        generator: the source of the random order; an int is a seed, None is torch's global generator.

    Returns:
        The mean and the standard deviation over the splits. The score of a split is between 1 and K.

    Warns:
        UserWarning: if a split has fewer than K images, which limits the score.

    Raises:
        TypeError: if the logits are not a floating-point tensor, or ``splits`` is not an integer.
        ValueError: if ``splits`` is below 1, or there are fewer than two images per split.

    References:
        Salimans et al., 2016, arXiv:1606.03498, Sec. 4.
    """
    logits = check_features(logits, "logits")
    check_count("splits", splits)
    n, classes = logits.shape
    if n < 2 * splits:
        raise ValueError(
            f"the Inception Score needs at least 2 images in each of the {splits} splits, {2 * splits} in all, got {n}."
        )
    if n // splits < classes:
        warnings.warn(
            f"the Inception Score with {n // splits:,} images per split is at most {n // splits:,} and biased downward "
            f"for {classes:,} classes. Use at least {splits * classes:,} images, preferably 50,000.",
            stacklevel=2,
        )
    shuffled = random_rows(logits, n, generator)
    scores = []
    for i in range(splits):
        logs = double(shuffled[i * n // splits : (i + 1) * n // splits]).log_softmax(1)
        marginal = logs.logsumexp(0) - math.log(len(logs))
        scores.append((logs.exp() * (logs - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return Estimate(float(values.mean()), float(values.std(correction=0)))


# -- Balls around features --------------------------------------------------------------------------------------------


def precision_recall(real: Features, generated: Features, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall.

    Args:
        real: features of real images (N, D), or ``Statistics`` with features.
        generated: features of generated images (M, D). Published figures have N = M.
        k: the radius of a ball is the distance to the k-th nearest neighbor; at least 1.

    Returns:
        Precision, the fraction of generated features in the ball of a real feature; and recall, the fraction of real
        features in the ball of a generated feature.

    Raises:
        TypeError: if ``real`` or ``generated`` is something else, or k is not an integer.
        ValueError: if k is below 1, a set has at most k features, or the dimensions differ.

    References:
        Kynkäänniemi et al., 2019, arXiv:1904.06991, Eq. 1-3.
    """
    real, generated = _pair(real, generated, ("real", "generated"))
    _enough(k, real=len(real), generated=len(generated))
    mean = _mean(real)
    reach, own = _squared_radii(real, k, mean), _squared_radii(generated, k, mean)
    inside, covered = torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(reach, dtype=torch.bool)
    for rows, columns, distances in _blocks(real, generated, mean):
        inside[columns] |= (distances <= reach[rows, None]).any(0)
        covered[rows] |= (distances <= own[None, columns]).any(1)
    return int(inside.sum()) / len(generated), int(covered.sum()) / len(real)


def density_coverage(real: Features, generated: Features, *, k: int = 5) -> tuple[float, float]:
    """Density and coverage.

    Args:
        real: features of real images (N, D), or ``Statistics`` with features.
        generated: features of generated images (M, D).
        k: the radius of a ball is the distance to the k-th nearest neighbor; at least 1.

    Returns:
        Density, the mean number of balls that contain a generated feature, divided by k, which may exceed 1; and
        coverage, the fraction of balls that contain a generated feature.

    Raises:
        TypeError: if ``real`` or ``generated`` is something else, or k is not an integer.
        ValueError: if k is below 1, there are at most k real features, or the dimensions differ.

    References:
        Naeem et al., 2020, arXiv:2002.09797, Eq. 3 and 4.
    """
    real, generated = _pair(real, generated, ("real", "generated"))
    _enough(k, real=len(real))
    mean = _mean(real)
    reach = _squared_radii(real, k, mean)
    count, covered = 0, torch.zeros_like(reach, dtype=torch.bool)
    for rows, _, distances in _blocks(real, generated, mean):
        inside = distances <= reach[rows, None]
        count += int(inside.sum())
        covered[rows] |= inside.any(1)
    return count / (k * len(generated)), int(covered.sum()) / len(real)


def _mean(features: Tensor) -> Tensor:
    """The mean (D,) in float64."""
    return torch.stack([double(block).sum(0) for block in features.split(_BLOCK)]).sum(0) / len(features)


def _squared_radii(features: Tensor, k: int, mean: Tensor) -> Tensor:
    """The squared radius (N,) of the ball of each feature, whose k-th nearest neighbor is inside despite rounding."""
    radii, nearest = [], mean.new_empty(0)
    for rows, columns, distances in _blocks(features, features, mean):
        if columns.start == 0:
            nearest = distances.new_full((len(distances), k), math.inf)
        if rows == columns:
            distances.fill_diagonal_(math.inf)  # a feature is not its own neighbor
        nearest = torch.cat([nearest, distances], 1).topk(k, 1, largest=False).values
        if columns.stop == len(features):
            radii.append(nearest[:, -1])
    return torch.cat(radii) * (1 + _TIE)


def _blocks(a: Tensor, b: Tensor, mean: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields the squared distances of all pairs in blocks: the slices of a and of b, and their distances.

    The mean is subtracted from both sets, since smaller norms lose fewer digits to cancellation.
    """
    for rows in _slices(len(a)):
        x = double(a[rows]) - mean
        for columns in _slices(len(b)):
            yield rows, columns, squared_distances(x, double(b[columns]) - mean)


def _slices(n: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK)]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared distances (N, M), set to 0 where they are below their rounding error."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    distances = torch.addmm(norms, a, b.T, alpha=-2)
    return distances.masked_fill_(distances <= a.shape[1] * torch.finfo(a.dtype).eps * norms, 0)


# -- Shared -----------------------------------------------------------------------------------------------------------


def _pair(first: Features, second: Features, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Checks two sets of features, and moves the second to the device of the first."""
    a, b = rows_of(first, names[0]), rows_of(second, names[1])
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same dimension, got {a.shape[1]} and {b.shape[1]}. Use one "
            "extractor, and images of one size."
        )
    return a, b.to(a.device)


def rows_of(features: Features, name: str) -> Tensor:
    """Checks features (N, D), or takes them from statistics.

    Raises:
        TypeError: if they are not a floating-point tensor.
        ValueError: if they are not finite, (N, D) and not empty, or the statistics have none.
    """
    if isinstance(features, Statistics):
        if features.features is None:
            raise ValueError(f"{name} must be features, but the statistics have none. Compute them with features=True.")
        features = features.features
    return check_features(features, name)


def _enough(k: int, **counts: int) -> None:
    check_count("k", k)
    for name, count in counts.items():
        if count <= k:
            raise ValueError(f"{name} must have more than k = {k} features, so that each has k neighbors, got {count}.")


def random_rows(features: Tensor, size: int, generator: torch.Generator | int | None = 0) -> Tensor:
    """Draws ``size`` different rows of features (N, D) in random order. The result does not depend on their order.

    Args:
        features: features (N, D).
        size: the number of rows, at most N.
        generator: the source of the random numbers; an int is a seed, None is torch's global generator.
    """
    return features[_canonical(features)[_draw(len(features), size, single_generator(generator))]]


def _canonical(features: Tensor) -> Tensor:
    """The indices (N,) that sort features by their projection on a fixed direction."""
    direction = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = direction.to(double(features[:1]).device)
    return torch.cat([double(block) @ direction for block in features.split(_BLOCK)]).argsort().to(features.device)


def _draw(n: int, size: int, generator: torch.Generator | None) -> Tensor:
    """``size`` different indices below n, in random order, on the CPU."""
    device = "cpu" if generator is None else generator.device
    return torch.randperm(n, generator=generator, device=device)[:size].cpu()


# -- Accumulators -----------------------------------------------------------------------------------------------------


class Accumulator(ABC, Generic[T]):
    """A metric of generated images whose features arrive in batches, on one process or many.

    The result is that of the corresponding function for all features, up to rounding.

    Attributes:
        takes: the argument of ``update``, "features" or "logits".

    Example:
        >>> metric = FrechetDistance(reference=torch.tensor([[0.0], [2.0]]))
        >>> metric.update(torch.tensor([[3.0]]))
        >>> metric.update(torch.tensor([[5.0]]))
        >>> metric.compute()
        9.0
    """

    takes: ClassVar[Literal["features", "logits"]] = "features"
    _seen: Moments | Rows

    def update(self, features: Tensor) -> None:
        """Adds the features (N, D), or the logits (N, K), of generated images.

        Raises:
            TypeError, ValueError: if they are not finite floating-point features (N, D), or D differs from before.
        """
        self._seen.update(features)

    def merge(self, other: Accumulator[T]) -> None:
        """Adds all features of another accumulator of the same metric.

        Raises:
            TypeError: if it is of another metric.
            ValueError: if the dimension differs.
        """
        if type(other) is not type(self):
            raise TypeError(f"other must be a {type(self).__name__} too, got {type(other).__name__}.")
        self._seen.merge(other._seen)  # type: ignore[arg-type]  # both are Moments, or both Rows

    @abstractmethod
    def compute(self) -> T:
        """Computes the metric of the features of all processes of ``torch.distributed``; every process must call it.

        More features can be added afterwards.

        Raises:
            ValueError: as the corresponding function, for example if there are too few features.
        """


class _OfRows(Accumulator[T]):
    """A metric that needs all features."""

    _seen: Rows

    def __init__(self, metric: Callable[[Tensor], T]) -> None:
        self._seen, self._metric = Rows(), metric

    def compute(self) -> T:
        return self._metric(self._seen.gather())


class FrechetDistance(Accumulator[float]):
    """Accumulates features for ``frechet_distance`` to a reference. The memory does not grow with their number.

    Args:
        reference: features, ``Moments`` or ``Statistics`` of real images.
    """

    _seen: Moments

    def __init__(self, reference: Normal) -> None:
        self._seen = Moments()
        self._reference = reference

    def compute(self) -> float:  # noqa: D102
        return frechet_distance(self._seen.reduce(), self._reference)


class FrechetExtrapolation(_OfRows[Extrapolation]):
    """Accumulates features for ``frechet_extrapolation`` to a reference. It keeps all features.

    Args:
        reference: features, ``Moments`` or ``Statistics`` of real images.
        sizes: the sizes of the subsets.
        seed: the seed of the subsets.
    """

    def __init__(self, reference: Normal, *, sizes: Sequence[int] | None = None, seed: int = 0) -> None:
        super().__init__(partial(frechet_extrapolation, reference=reference, sizes=sizes, generator=seed))


class KernelDistance(_OfRows[Estimate]):
    """Accumulates features for ``kernel_distance`` to a reference. It keeps all features.

    Args:
        reference: features of real images (M, D), or ``Statistics`` with features.
        subsets: the number of pairs of random subsets.
        subset_size: the number of features in each subset.
        seed: the seed of the subsets.
    """

    def __init__(self, reference: Features, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> None:
        super().__init__(
            partial(kernel_distance, b=reference, subsets=subsets, subset_size=subset_size, generator=seed)
        )


class InceptionScore(_OfRows[Estimate]):
    """Accumulates logits for ``inception_score``. It keeps all logits.

    Args:
        splits: the number of parts.
        seed: the seed of the random order.
    """

    takes = "logits"

    def __init__(self, *, splits: int = 10, seed: int = 0) -> None:
        super().__init__(partial(inception_score, splits=splits, generator=seed))


class PrecisionRecall(_OfRows[tuple[float, float]]):
    """Accumulates features for ``precision_recall``. It keeps all features.

    Args:
        reference: features of real images (N, D), or ``Statistics`` with features.
        k: the radius of a ball is the distance to the k-th nearest neighbor.
    """

    def __init__(self, reference: Features, *, k: int = 3) -> None:
        super().__init__(partial(precision_recall, reference, k=k))


class DensityCoverage(_OfRows[tuple[float, float]]):
    """Accumulates features for ``density_coverage``. It keeps all features.

    Args:
        reference: features of real images (N, D), or ``Statistics`` with features.
        k: the radius of a ball is the distance to the k-th nearest neighbor.
    """

    def __init__(self, reference: Features, *, k: int = 5) -> None:
        super().__init__(partial(density_coverage, reference, k=k))


METRICS: Mapping[str, type[Accumulator[Any]]] = MappingProxyType(
    {
        "frechet": FrechetDistance,
        "frechet-infinity": FrechetExtrapolation,
        "kernel": KernelDistance,
        "inception-score": InceptionScore,
        "precision-recall": PrecisionRecall,
        "density-coverage": DensityCoverage,
    }
)
