r"""Metrics of generated images: functions of the features of samples and of real images, and the table ``METRICS``.

``evaluate`` measures what the table has, and so does its command. A new metric is one function and one line.

**Fréchet distance**, of the Gaussians with the means and covariances of two sets of features,

.. math:: d^2 = \lVert m_a - m_b \rVert^2 + \mathrm{tr}\bigl(S_a + S_b - 2 (S_a^{1/2} S_b S_a^{1/2})^{1/2}\bigr) .

With Inception's features it is the FID. Let :math:`S = R^\top R`, where R is computed from the eigenvalues of S that
exceed the rounding error. The trace of the root is the sum of the singular values of :math:`R_a R_b^\top`. It is real,
and accurate for singular covariances as well.

*Bias.* The distance computed from n features is too large by about c / n. The constant c depends on the distribution
and grows with the number of dimensions, so distances from different n are not comparable.

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

**Other data.** The distances of ``distances``, the classifier of ``two_sample`` and the spectrum of ``spectrum`` are
for data that are not pictures, and need no features.

**Precision and memory.** All computations are in float64, on the device of the features, or on the CPU if the device
does not support float64. Distances between features are computed in blocks of 2,048 x 2,048, which need about 200 MB in
addition to the features, plus 66 MB per 1,024 dimensions. A distance below its rounding error is set to zero, so that
the distance between equal features is exactly zero. A feature at the distance of the radius is inside of the ball.

**Order.** Random subsets and splits are drawn after the features were sorted by a fixed projection. The result
therefore does not depend on the order of the features, or on the process that computed them.

References:
    Heusel et al., 2017, GANs Trained by a Two Time-Scale Update Rule, arXiv:1706.08500 (FID).
    Bińkowski et al., 2018, Demystifying MMD GANs, arXiv:1801.01401 (KID).
    Salimans et al., 2016, Improved Techniques for Training GANs, arXiv:1606.03498 (Inception Score).
    Kynkäänniemi et al., 2019, Improved Precision and Recall Metric, arXiv:1904.06991.
    Naeem et al., 2020, Reliable Fidelity and Diversity Metrics for Generative Models, arXiv:2002.09797.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from scorematch.core.arguments import check_count
from scorematch.core.randomness import single_generator
from scorematch.evaluation.distances import energy_distance, maximum_mean_discrepancy, sliced_wasserstein_distance
from scorematch.evaluation.estimate import Estimate, share_of
from scorematch.evaluation.features import Extracted
from scorematch.evaluation.frechet import frechet_distance
from scorematch.evaluation.rows import (
    BLOCK,
    canonical_order,
    check_features,
    double,
    draw,
    random_rows,
    squared_distances,
)
from scorematch.evaluation.spectrum import spectrum_error, values_distance
from scorematch.evaluation.statistics import Features, Statistics, features_of, pair_of
from scorematch.evaluation.two_sample import FOLDS, classifier_two_sample_test

_TIE = 1e-9  # the relative difference up to which squared distances count as equal; it is above their rounding error
_SUBSET_SIZE, _SPLITS, _NEAREST, _NEAREST_FOR_COVERAGE = 1000, 10, 3, 5


# -- Kernel distance --------------------------------------------------------------------------------------------------


def kernel_distance(
    features: Features,
    reference: Features,
    *,
    subsets: int = 100,
    subset_size: int = _SUBSET_SIZE,
    generator: torch.Generator | int | None = 0,
) -> Estimate:
    """The squared maximum mean discrepancy between two sets of features; with Inception's features, the KID.

    Args:
        features: features of generated images (N, D).
        reference: features of real images (M, D), or ``Statistics`` with features.
        subsets: the number of pairs of random subsets.
        subset_size: the number of features in each subset, drawn without replacement; at least 2, at most N and M.
        generator: the source of the subsets; an int is a seed, None is torch's global generator.

    Returns:
        The mean and the standard deviation over the subsets. The deviation is that of a single subset, not of the mean.
        It is None if each subset is the whole set.

    References:
        Bińkowski et al., 2018, arXiv:1801.01401, Sec. 4 and Eq. 4.
    """
    first, second = pair_of(features, reference)
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
    orders = [(each, canonical_order(each)) for each in (first, second)]
    found = []
    whole = subset_size == len(first) == len(second)
    for _ in range(1 if whole else subsets):
        x, y = (double(each[order[draw(len(each), subset_size, drawing)]]) for each, order in orders)
        found.append(_discrepancy(x, y))
    values = torch.tensor(found, dtype=torch.float64, device="cpu")
    return Estimate(float(values.mean()), float(values.std(correction=0)) or None)


def _discrepancy(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy between features (m, D) and (m, D)."""

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def others(u: Tensor) -> Tensor:
        products = kernel(u, u)
        return (products.sum() - products.trace()) / (len(u) * (len(u) - 1))

    return float(others(x) + others(y) - 2 * kernel(x, y).mean())


# -- Of logits --------------------------------------------------------------------------------------------------------


def inception_score(logits: Tensor, *, splits: int = _SPLITS, generator: torch.Generator | int | None = 0) -> Estimate:
    """The exponential of the mutual information between images and classes.

    Args:
        logits: the logits of the classes (N, K), such as those of ``inception().extract(images)``.
        splits: the number of random parts of N / splits images each.
        generator: the source of the random order; an int is a seed, None is torch's global generator.

    Returns:
        The mean and the standard deviation over the splits, None for one split. The score of a split is between 1 and
        K.

    Warns:
        UserWarning: if a split has fewer than K images, which limits the score.

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
    return Estimate(float(values.mean()), float(values.std(correction=0)) if splits > 1 else None)


def class_shares(logits: Tensor, *, confident: float = 0.9) -> tuple[Estimate, Estimate]:
    """The share of images for which one class has a high probability, and the share of the rarest class.

    It is for the logits (N, K) of a classifier of the classes in the data; ``confident`` is the probability.
    """
    probabilities, classes = logits.softmax(1).max(1)
    rarest = int(torch.bincount(classes, minlength=logits.shape[1]).min())
    return share_of(int((probabilities > confident).sum()), len(logits)), share_of(rarest, len(logits))


# -- Balls around features --------------------------------------------------------------------------------------------


def precision_recall(features: Features, reference: Features, *, k: int = _NEAREST) -> tuple[Estimate, Estimate]:
    """Improved precision and recall.

    The errors are those of shares, which treat the balls around features as given. Those of recall are around generated
    images: where these are less diverse than the data, recall varies between sets of them by up to about twice its
    error.

    Args:
        features: features of generated images (N, D). Published figures have N = M.
        reference: features of real images (M, D), or ``Statistics`` with features.
        k: the radius of a ball is the distance to the k-th nearest neighbor; at least 1.

    Returns:
        Precision, the share of generated features in the ball of a real feature; and recall, the share of real features
        in the ball of a generated feature.

    References:
        Kynkäänniemi et al., 2019, arXiv:1904.06991, Eq. 1-3.
    """
    generated, real = pair_of(features, reference)
    _enough(k, features=len(generated), reference=len(real))
    mean = _mean(real)
    reach, own = _squared_radii(real, k, mean), _squared_radii(generated, k, mean)
    inside, covered = torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(reach, dtype=torch.bool)
    for rows, columns, distances in _blocks(real, generated, mean):
        inside[columns] |= (distances <= reach[rows, None]).any(0)
        covered[rows] |= (distances <= own[None, columns]).any(1)
    return share_of(int(inside.sum()), len(generated)), share_of(int(covered.sum()), len(real))


def density_coverage(
    features: Features, reference: Features, *, k: int = _NEAREST_FOR_COVERAGE
) -> tuple[Estimate, Estimate]:
    """Density and coverage.

    Args:
        features: features of generated images (N, D).
        reference: features of real images (M, D), or ``Statistics`` with features.
        k: the radius of a ball is the distance to the k-th nearest neighbor; at least 1.

    Returns:
        Density, the mean number of balls that contain a generated feature, divided by k, which may exceed 1 and has no
        error; and coverage, the share of balls that contain a generated feature.

    References:
        Naeem et al., 2020, arXiv:2002.09797, Eq. 3 and 4.
    """
    generated, real = pair_of(features, reference)
    _enough(k, reference=len(real))
    mean = _mean(real)
    reach = _squared_radii(real, k, mean)
    count, covered = 0, torch.zeros_like(reach, dtype=torch.bool)
    for rows, _, distances in _blocks(real, generated, mean):
        inside = distances <= reach[rows, None]
        count += int(inside.sum())
        covered[rows] |= inside.any(1)
    return Estimate(count / (k * len(generated))), share_of(int(covered.sum()), len(real))


def _mean(features: Tensor) -> Tensor:
    """The mean (D,) in float64."""
    return torch.stack([double(block).sum(0) for block in features.split(BLOCK)]).sum(0) / len(features)


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
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


# -- Shared -----------------------------------------------------------------------------------------------------------


def _enough(k: int, **counts: int) -> None:
    check_count("k", k)
    for name, count in counts.items():
        if count <= k:
            raise ValueError(f"{name} must have more than k = {k} features, so that each has k neighbors, got {count}.")


# -- The table --------------------------------------------------------------------------------------------------------

_OF_A_SHARE = "standard error of a share"
_TO_FIRST_ORDER = "standard error over both sets (delta method)"

Kind = Literal["pictures", "arrays"]


@dataclass(frozen=True)
class Metric:
    """A line of the table ``METRICS``.

    Args:
        function: returns an ``Estimate``, or a tuple of them. Its arguments are the features (N, D) of the samples, and
            the features or ``Statistics`` of the reference; or the logits (N, K) of the samples alone. Its keyword
            arguments with numbers are settings, which evaluations report.
        figures: for each estimate its name, and its label in tables.
        error: a description of the errors.
        needs: what the metric needs: the "statistics" of the reference, its mean and covariance; its "features";
            "equal" for features of both sets, in equal numbers: a random subset of the larger set is used; the "logits"
            of the samples; or the "values" of both sets, data (N, C, ...) that are not pictures, whose channels have
            the mean 0 and the standard deviation 1 in the reference; "fields" are the same, with a spatial axis.
        least: the smallest number of images in a set, or a function of the dimension D (for logits, K) that returns it.
        default: of which data the metric is measured if no metrics are named; None for none.
    """

    function: Callable[..., Estimate | tuple[Estimate, ...]]
    figures: Mapping[str, str]
    error: str = ""
    needs: Literal["statistics", "features", "equal", "logits", "values", "fields"] = "statistics"
    least: int | Callable[[int], int] = 2
    default: Kind | None = "pictures"

    @property
    def settings(self) -> dict[str, int | float]:
        """The numbers among the keyword arguments of the function."""
        options = {each.name: each.default for each in inspect.signature(self.function).parameters.values()}
        return {
            name: value for name, value in options.items() if isinstance(value, int | float) and name != "generator"
        }

    @property
    def needs_features(self) -> bool:
        """Whether the metric needs the features of the reference."""
        return self.needs in ("features", "equal")

    def lacks(self, n: int, seen: Extracted, reference: Statistics) -> str | None:
        """Returns the reason why the metric cannot be measured, or None if it can.

        Args:
            n: the number of images.
            seen: the features and logits of one image or more, of which only the dimensions are used.
            reference: the statistics of the reference.
        """
        values, each = seen.features, f" for features of {seen.features.shape[1]:,} dimensions"
        if self.needs in ("values", "fields"):
            return "is for data that are not pictures"
        if self.needs == "logits":
            if seen.logits is None:
                return "needs an extractor with logits of classes"
            values, each = seen.logits, f" for {seen.logits.shape[1]:,} classes"
        elif self.needs_features:
            if reference.features is None:
                return "needs the features of the reference, and the file of statistics has none"
            n, each = min(n, len(reference.features)), " in each set"
        least = self.least(values.shape[1]) if callable(self.least) else self.least
        return None if n >= least else f"needs at least {least:,} images{each}, and there are {n:,}"

    def __call__(self, seen: Extracted, reference: Features) -> dict[str, Estimate]:
        """Computes the estimates by name."""
        if self.needs == "logits":
            found = self.function(seen.class_logits)
        elif self.needs == "equal":
            sets = seen.features, features_of(reference, "reference")
            n = min(map(len, sets))
            found = self.function(*(each if len(each) == n else random_rows(each, n) for each in sets))
        else:
            found = self.function(seen.features, reference)
        return self.named(found)

    def named(self, found: Estimate | tuple[Estimate, ...]) -> dict[str, Estimate]:
        """What the function returned, by name."""
        return dict(zip(self.figures, (found,) if isinstance(found, Estimate) else found, strict=True))


METRICS: dict[str, Metric] = {
    "frechet": Metric(
        frechet_distance, {"frechet": "Fréchet distance ↓"}, "standard error over the images (delta method)"
    ),
    "kernel": Metric(
        kernel_distance,
        {"kernel": "kernel distance ↓"},
        f"standard deviation over 100 subsets of {_SUBSET_SIZE:,} images",
        "features",
        _SUBSET_SIZE,
    ),
    "inception-score": Metric(
        inception_score,
        {"inception-score": "Inception Score ↑"},
        f"standard deviation over {_SPLITS} splits",
        "logits",
        lambda classes: _SPLITS * classes,
    ),
    "precision-recall": Metric(
        precision_recall, {"precision": "precision ↑", "recall": "recall ↑"}, _OF_A_SHARE, "equal", _NEAREST + 1
    ),
    "density-coverage": Metric(
        density_coverage,
        {"density": "density ↑", "coverage": "coverage ↑"},
        _OF_A_SHARE,
        "equal",
        _NEAREST_FOR_COVERAGE + 1,
    ),
    "classes": Metric(
        class_shares,
        {"confident": "share over 0.9 confident", "rarest": "share of the rarest class"},
        _OF_A_SHARE,
        "logits",
        default=None,
    ),
    "sliced-wasserstein": Metric(
        sliced_wasserstein_distance,
        {"sliced-wasserstein": "sliced Wasserstein distance ↓"},
        _TO_FIRST_ORDER,
        "equal",
        default="arrays",
    ),
    "energy": Metric(energy_distance, {"energy": "energy distance ↓"}, _TO_FIRST_ORDER, "equal", default="arrays"),
    "mmd": Metric(
        maximum_mean_discrepancy,
        {"mmd": "squared maximum mean discrepancy ↓"},
        _TO_FIRST_ORDER,
        "equal",
        default="arrays",
    ),
    "c2st": Metric(
        classifier_two_sample_test,
        {"c2st": "accuracy of a classifier (C2ST), best 0.5 ↓"},
        f"standard error over {FOLDS} folds",
        "equal",
        FOLDS,
        default="arrays",
    ),
    "spectrum": Metric(
        spectrum_error,
        {"spectrum": "relative error of the spectrum ↓", "spectrum-largest": "largest error at a wave number ↓"},
        "standard deviation over bootstrap samples",
        "fields",
        default="arrays",
    ),
    "values": Metric(
        values_distance,
        {"values": "Wasserstein distance of single values ↓"},
        "standard error over the samples (delta method)",
        "values",
        default="arrays",
    ),
}


def default_metrics(kind: Kind = "pictures") -> tuple[str, ...]:
    """The names of the metrics of a kind of data that are measured when none are named."""
    return tuple(name for name, each in METRICS.items() if each.default == kind)
