"""Metrics of features: closed forms, brute force, torch-fidelity, and laws of all metrics."""

import itertools
import math
import textwrap
from functools import partial

import numpy as np
import pytest
import torch

from scorematch.evaluation import (
    METRICS,
    Metric,
    Statistics,
    class_shares,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    metrics,
    precision_recall,
    rows,
)
from scorematch.evaluation.accumulate import Moments, Rows
from scorematch.evaluation.features import Extracted
from tests.helpers import seed

exact = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def normal(n, dimension, number=0, dtype=torch.float64):
    return torch.randn(n, dimension, generator=seed(number), dtype=dtype)


def gaussian(mean, covariance, n=None):
    """Statistics of a normal distribution."""
    mean, covariance = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, covariance))
    return Statistics(mean, covariance, n, "exact", "1", "none")


def covariance(dimension, number=0):
    root = normal(dimension, dimension, number)
    return root @ root.T / dimension + 0.1 * torch.eye(dimension, dtype=torch.float64)


def moments_of(*batches):
    moments = Moments()
    for batch in batches:
        moments.update(batch)
    return moments


# -- Moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [20, 29, 1]])
def test_moments_are_those_of_all_features_at_once(sizes):
    features = normal(50, 4) @ normal(4, 4, 1) + torch.tensor([0.0, 1.0, 1e3, 1e6])
    moments = moments_of(*features.split(sizes))
    assert moments.n == 50
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(moments.covariance, torch.cov(features.T), rtol=1e-9, atol=1e-9)


def test_a_large_mean_does_not_make_the_covariance_less_exact():
    """Sums of squares would lose all of them. The mean is rounded to 1e-8, and so is each deviation."""
    features = torch.arange(1000.0, dtype=torch.float64)[:, None] % 2 + 1e8
    moments = moments_of(*features.split(7))
    assert moments.covariance.item() == pytest.approx(0.25 * 1000 / 999, rel=1e-7)


def test_moments_are_in_float64_and_in_blocks(monkeypatch):
    from scorematch.evaluation import accumulate

    features = torch.full((1000, 2), 0.1, dtype=torch.float32)
    features[::2] = 16777217.0
    whole = moments_of(features)
    assert whole.mean.dtype == torch.float64
    exact(whole.mean, features.double().mean(0))
    monkeypatch.setattr(accumulate, "_BLOCK", 3)
    parts = moments_of(features)
    exact(parts.mean, whole.mean)
    exact(parts.covariance, whole.covariance)


def test_moments_of_one_process_are_those_of_all():
    moments = moments_of(normal(10, 3))
    assert moments.reduce() is moments
    before = moments.mean.clone()
    moments.update(normal(7, 3, 1))
    assert moments.n == 17 and not torch.equal(moments.mean, before)


def test_moments_need_features():
    with pytest.raises(ValueError, match="there are no features yet: call update"):
        Moments().mean  # noqa: B018
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        moments_of(normal(1, 3)).covariance  # noqa: B018
    with pytest.raises(ValueError, match="features have 4 dimensions, but those before have 3"):
        moments_of(normal(2, 3), normal(2, 4))
    with pytest.raises(ValueError, match="there are no features yet: call update"):
        Rows().gather()


def test_rows_keep_the_wider_dtype():
    kept = Rows()
    kept.update(torch.ones(2, 3, dtype=torch.float16))
    assert kept.gather().dtype == torch.float32
    kept.update(torch.full((1, 3), 0.1, dtype=torch.float64))
    assert kept.gather().dtype == torch.float64 and kept.gather()[2, 0] == 0.1 and len(kept) == 3


# -- Fréchet distance -------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_with_the_same_axes():
    axes = torch.linalg.qr(normal(5, 5)).Q
    a, b = torch.rand(2, 5, generator=seed(1), dtype=torch.float64)
    first = gaussian(torch.zeros(5), axes * a @ axes.T)
    second = gaussian(torch.arange(5), axes * b @ axes.T)
    expected = 30 + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(first, second).value == pytest.approx(float(expected), rel=1e-13)
    assert frechet_distance(second, first).value == pytest.approx(float(expected), rel=1e-13)


def test_frechet_distance_has_the_part_of_small_variances():
    axes = torch.linalg.qr(normal(2, 2)).Q
    first, second = (gaussian([0, 0], axes * torch.tensor([1.0, v**2]).double() @ axes.T) for v in (1e-4, 3e-4))
    assert frechet_distance(first, second).value == pytest.approx(4e-8, rel=1e-5)


def test_frechet_distance_in_two_dimensions():
    """The root of a 2 x 2 matrix M has the trace sqrt(tr M + 2 sqrt(det M))."""
    a, b = covariance(2), covariance(2, 1)
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = a.trace() + b.trace() - 2 * root
    found = frechet_distance(gaussian([0, 0], a), gaussian([0, 0], b)).value
    assert found == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frechet_distance_of_features_is_that_of_their_moments(dtype):
    a, b = normal(40, 6, dtype=dtype), 2 * normal(50, 6, 1, dtype) + 1
    whole = frechet_distance(a, b).value
    moments = moments_of(*a.split(7))
    assert frechet_distance(gaussian(moments.mean, moments.covariance), b).value == pytest.approx(whole, rel=1e-12)
    assert frechet_distance(a, gaussian(b.double().mean(0), torch.cov(b.double().T))).value == pytest.approx(
        whole, rel=1e-12
    )


@pytest.mark.filterwarnings("ignore:the covariance of:UserWarning")
@pytest.mark.parametrize("n", [2, 5, 30])
def test_frechet_distance_with_fewer_features_than_dimensions(n):
    """Then the trace is that of the singular values of one set of centered features times the other, without roots."""
    a, b = 3 * normal(n, 20), normal(9, 20, 1) + 0.5
    x, y = ((each - each.mean(0)) / math.sqrt(len(each) - 1) for each in (a, b))
    common = torch.linalg.svdvals(x @ y.T).sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * common
    assert frechet_distance(a, b).value == pytest.approx(float(expected), rel=1e-12)
    assert frechet_distance(a, a).value == pytest.approx(0, abs=1e-11)
    assert frechet_distance(a, a).value >= 0


@pytest.mark.filterwarnings("ignore:the covariance of:UserWarning")
def test_frechet_distance_of_sets_in_orthogonal_planes_and_of_points():
    a, b = torch.zeros(2, 9, 4, dtype=torch.float64)
    a[:, :2], b[:, 2:] = normal(9, 2), normal(9, 2, 1)
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum()
    assert frechet_distance(a, b).value == pytest.approx(float(expected), rel=1e-13)
    assert frechet_distance(torch.zeros(3, 2), torch.ones(3, 2)).value == 2  # both covariances are zero


def test_frechet_distance_equals_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = normal(200, 30) @ normal(30, 30, 2), normal(150, 30, 1) + 0.3
    statistics = [fidelity.fid_features_to_statistics(each) for each in (a, b)]
    theirs = fidelity.fid_statistics_to_metric(*statistics, False)[fidelity.KEY_METRIC_FID]
    assert frechet_distance(a, b).value == pytest.approx(theirs, rel=1e-10)


def test_a_singular_covariance_is_told():
    with pytest.warns(UserWarning, match="the covariance of 4 features of 4 dimensions is singular"):
        frechet_distance(normal(4, 4), normal(5, 4))
    frechet_distance(normal(5, 4), gaussian(torch.zeros(4), torch.eye(4)))  # of unknown n


def test_invalid_arguments_of_the_frechet_distance_raise():
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        frechet_distance(normal(1, 3), normal(9, 3))
    with pytest.raises(ValueError, match="the same dimension, got 3 and 4"):
        frechet_distance(normal(9, 3), normal(9, 4))
    with pytest.raises(TypeError, match=r"must be a tensor .N, D., got ndarray"):
        frechet_distance(np.ones((9, 3)), normal(9, 3))
    with pytest.raises(ValueError, match="must have no negative eigenvalues, but its eigenvalues are from -1 to 2"):
        frechet_distance(gaussian([0, 0], [[2, 0], [0, -1]]), normal(9, 2))


# -- The standard error -----------------------------------------------------------------------------------------------


def test_the_standard_error_in_one_dimension():
    """d = (m - m_r)^2 + (s - s_r)^2; the mean and the variance of n features determine its first-order change."""
    features, reference = normal(400, 1) * 2 + 1, gaussian([0.0], [[0.25]])
    found = frechet_distance(features, reference)
    x = features - features.mean()
    s = x.std()
    change = 2 * features.mean() * x + (1 - 0.5 / s) * x**2  # s_r = 0.5
    assert found.error == pytest.approx(float(change.std() / 20), rel=1e-9)


@pytest.mark.slow
def test_the_standard_error_is_the_spread_over_many_sets():
    root, reference = normal(4, 4), normal(3000, 4, 1)
    found = [frechet_distance(normal(300, 4, 10 + i) @ root + 0.3, reference) for i in range(200)]
    spread = torch.tensor([each.value for each in found]).std()
    assert np.mean([each.error for each in found]) == pytest.approx(float(spread), rel=0.2)  # 4 errors of a spread


def test_the_error_of_equal_sets_is_not_that_of_rounding():
    features = 100 * normal(40, 6)
    assert frechet_distance(features, features).error == 0 < frechet_distance(features, 1.001 * features).error


def test_the_standard_error_warns_and_refuses_as_the_distance():
    with pytest.warns(UserWarning, match="covariance of 4 features of 4 dimensions is singular"):
        assert math.isfinite(frechet_distance(normal(4, 4), normal(40, 4)).error)
    with pytest.raises(ValueError, match="same dimension, got 3 and 4"):
        frechet_distance(normal(9, 3), normal(9, 4))


def test_the_gaussian_of_statistics_is_computed_once(monkeypatch):
    reference = gaussian(torch.zeros(3), covariance(3))
    expected = frechet_distance(normal(30, 3), reference)
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    assert frechet_distance(normal(30, 3), reference) == expected and len(calls) == 1


def test_random_rows_do_not_depend_on_the_order():
    features = normal(30, 3)
    found = rows.random_rows(features, 10)
    assert found.shape == (10, 3) and len(torch.unique(found, dim=0)) == 10
    assert torch.equal(rows.random_rows(features.flip(0), 10), found)
    assert not torch.equal(rows.random_rows(features, 10, 1), found)


# -- Kernel distance --------------------------------------------------------------------------------------------------


def brute_discrepancy(x, y):
    def kernel(u, v):
        return (sum(i * j for i, j in zip(u, v, strict=True)) / len(u) + 1) ** 3

    x, y = x.tolist(), y.tolist()
    within = [
        sum(kernel(u, v) for u, v in itertools.permutations(each, 2)) / (len(each) * (len(each) - 1)) for each in (x, y)
    ]
    between = sum(kernel(u, v) for u in x for v in y) / (len(x) * len(y))
    return sum(within) - 2 * between


def test_kernel_distance_of_whole_sets():
    a, b = normal(12, 3), 2 * normal(12, 3, 1) + 1
    found = kernel_distance(a, b, subset_size=12, subsets=3)
    assert found.value == pytest.approx(brute_discrepancy(a, b), rel=1e-12) and found.error is None
    assert kernel_distance(b, a, subset_size=12, subsets=1).value == pytest.approx(found.value, rel=1e-12)
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    theirs = fidelity.kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=12, verbose=False)
    assert found.value == pytest.approx(theirs[fidelity.KEY_METRIC_KID_MEAN], rel=1e-12)


@pytest.mark.slow
def test_kernel_distance_of_subsets():
    """With subsets of two features of either set, all possible values are known, and so are their mean and spread."""
    a, b = normal(4, 2), normal(5, 2, 1) + 1
    values = [
        brute_discrepancy(a[list(i)], b[list(k)])
        for i in itertools.combinations(range(4), 2)
        for k in itertools.combinations(range(5), 2)
    ]
    found = kernel_distance(a, b, subset_size=2, subsets=2000)
    spread = np.std(values)
    assert abs(found.value - np.mean(values)) < 4 * spread / math.sqrt(2000)
    assert found.error == pytest.approx(spread, rel=0.1)


def test_kernel_distance_is_unbiased():
    """The mean over pairs of sets of one distribution is 0 within its error."""
    values = [
        kernel_distance(normal(10, 2, 2 * i), normal(10, 2, 2 * i + 1), subset_size=10, subsets=1).value
        for i in range(200)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(200) < 0.5
    assert min(values) < 0


def test_invalid_arguments_of_the_kernel_distance_raise():
    a = normal(20, 3)
    with pytest.raises(ValueError, match=r"at least subset_size = 1,000 features in each set, got 20 and 20\. Write"):
        kernel_distance(a, a)
    with pytest.raises(ValueError, match="subset_size must be an integer of at least 2, got 1"):
        kernel_distance(a, a, subset_size=1)
    with pytest.raises(ValueError, match="subsets must be an integer of at least 1, got 0"):
        kernel_distance(a, a, subset_size=2, subsets=0)
    with pytest.raises(ValueError, match="features and reference must have the same dimension, got 3 and 2"):
        kernel_distance(a, a[:, :2], subset_size=2)


# -- Inception Score --------------------------------------------------------------------------------------------------


def test_inception_score_of_equal_and_of_certain_predictions():
    assert inception_score(torch.zeros(40, 4), splits=2) == pytest.approx((1, 0), abs=1e-14)
    certain = torch.eye(5, dtype=torch.float64).repeat(8, 1) * 1000
    assert inception_score(certain, splits=1) == (pytest.approx(5, rel=1e-12), None)  # no deviation of one split


@pytest.mark.parametrize("splits", [1, 3])
def test_inception_score_equals_torch_fidelity(splits):
    fidelity = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * normal(100, 6)
    found = inception_score(logits, splits=splits, generator=7)
    order = rows.canonical_order(logits)[torch.randperm(100, generator=seed(7))]  # theirs is another random order
    theirs = fidelity.isc_features_to_metric(logits[order], splits=splits, shuffle=False)
    mean, deviation = theirs.values()
    assert found.value == pytest.approx(mean, rel=1e-12) and mean > 1.5
    assert found.error == (None if splits == 1 else pytest.approx(deviation, rel=1e-12)) != 0


def test_inception_score_needs_images():
    with pytest.raises(ValueError, match="at least 2 images in each of the 10 splits, 20 in all, got 19"):
        inception_score(normal(19, 3))
    with pytest.warns(
        UserWarning, match=r"4 images per split is at most 4 and biased .* for 5 classes. Use at least 50 "
    ):
        inception_score(normal(40, 5))
    with pytest.raises(ValueError, match="splits must be an integer of at least 1, got 0"):
        inception_score(normal(19, 3), splits=0)


# -- Balls ------------------------------------------------------------------------------------------------------------


def brute_balls(real, generated, k):
    """Precision, recall, density and coverage."""
    between = torch.cdist(real, generated, compute_mode="donot_use_mm_for_euclid_dist")
    reach, own = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sort(1).values[:, k] for x in (real, generated)
    )
    inside = between <= reach[:, None]
    return (
        float(inside.any(0).double().mean()),
        float((between <= own).any(1).double().mean()),
        float(inside.double().sum(0).mean()) / k,
        float(inside.any(1).double().mean()),
    )


def balls(generated, real, k):
    """Precision, recall, density and coverage."""
    return [found.value for metric in (precision_recall, density_coverage) for found in metric(generated, real, k=k)]


def of(metric, *arguments, **options):
    """The values of a metric."""
    return tuple(found.value for found in metric(*arguments, **options))


@pytest.mark.parametrize("block", [2048, 16, 7])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_balls_equal_brute_force(k, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    real, generated = normal(40, 3), normal(32, 3, 1) + torch.tensor([2, 0, 0])
    shapes = []
    distances = metrics.squared_distances

    def watched(a, b):
        shapes.append((len(a), len(b)))
        return distances(a, b)

    monkeypatch.setattr(metrics, "squared_distances", watched)
    found = balls(generated, real, k)
    assert found == pytest.approx(brute_balls(real, generated, k), rel=1e-12)
    assert 0.2 < found[0] < 1 and 0.2 < found[1] < 1
    assert max(map(max, shapes)) <= block  # the memory is bounded


def test_precision_and_recall_equal_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = normal(60, 4), 1.2 * normal(50, 4, 1)
    theirs = fidelity.prc_features_to_metric(generated, real, verbose=False)
    expected = theirs[fidelity.KEY_METRIC_PRECISION], theirs[fidelity.KEY_METRIC_RECALL]
    assert of(precision_recall, generated, real) == pytest.approx(expected, rel=1e-6)  # theirs are float32 means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0, 1e4])
def test_balls_of_equal_distant_and_repeated_features(dtype, shift):
    real = normal(50, 300, dtype=dtype) + shift
    assert of(precision_recall, real.flip(0), real) == (1, 1)
    assert of(density_coverage, real.flip(0), real)[1] == 1
    assert of(precision_recall, real + 100, real) == of(density_coverage, real + 100, real) == (0, 0)
    # A collapsed generator: all balls of its own have radius 0, and only one real feature is at their place.
    collapsed = real[:1].expand(20, -1)
    assert of(precision_recall, collapsed, real) == (1, 1 / 50)
    # Twice each feature, exactly: each ball of k = 1 reaches to the copy.
    twice = torch.cat([real, real])
    assert of(density_coverage, real, twice, k=1) == (2, 1)


@pytest.mark.parametrize("scale", [1, 1 / 255])
def test_a_feature_at_the_distance_of_the_radius_is_in_the_ball(scale):
    """Of integers and of 8-bit values many distances are equal; the mean of the features is not on their grid."""
    for number in range(20):
        real, generated = (torch.randint(7, (n, 2), generator=seed(2 * number + n)).double() for n in (7, 8))
        assert balls(scale * generated, scale * real, 2) == pytest.approx(brute_balls(real, generated, 2), rel=1e-12)


def test_coverage_and_density_of_equal_distributions():
    """Density is 1 on average, and coverage 1 - prod (n - i) / (n + m - i) (Naeem et al., Lemma 2)."""
    n, m, k = 30, 20, 3
    found = np.array([of(density_coverage, normal(m, 2, 2 * i + 1), normal(n, 2, 2 * i), k=k) for i in range(150)])
    expected = 1, 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    error = found.std(0) / math.sqrt(len(found))
    assert (abs(found.mean(0) - expected) < 4 * error).all() and (error < 0.03).all()


@pytest.mark.parametrize(
    ("call", "name", "found"),
    [
        (lambda a: precision_recall(a, a, k=2.5), "k", "2.5"),
        (lambda a: density_coverage(a, a, k=None), "k", "None"),
        (lambda a: kernel_distance(a, a, subset_size=5.0), "subset_size", "5.0"),
        (lambda a: kernel_distance(a, a, subset_size=5, subsets="3"), "subsets", "'3'"),
        (lambda a: inception_score(a, splits=2.0), "splits", "2.0"),
    ],
)
def test_counts_must_be_integers(call, name, found):
    with pytest.raises(TypeError, match=f"{name} must be an integer of at least [12], got {found}"):
        call(normal(20, 3))


def test_balls_need_neighbors():
    a = normal(3, 2)
    with pytest.raises(ValueError, match=r"reference must have more than k = 3 features, .* got 3"):
        precision_recall(normal(9, 2), a)
    with pytest.raises(ValueError, match="features must have more than k = 3 features"):
        precision_recall(a, normal(9, 2))
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        density_coverage(a, a, k=0)
    assert of(density_coverage, a, normal(9, 2))[0] > 0  # its generated features need no neighbors


def test_the_errors_of_shares_are_those_of_independent_draws():
    precision, recall = precision_recall(normal(40, 3), normal(50, 3, 1))
    for share, n in ((precision, 40), (recall, 50)):
        assert share.error == pytest.approx((share.value * (1 - share.value) / n) ** 0.5)
    assert density_coverage(normal(40, 3), normal(50, 3, 1))[0].error is None


def test_the_shares_of_classes():
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.5, 0.0, 0.0], [9.0, 0.0, 0.0]])
    confident, rarest = class_shares(logits)
    assert confident == pytest.approx((0.75, (0.75 * 0.25 / 4) ** 0.5)) and rarest.value == 0


# -- All metrics ------------------------------------------------------------------------------------------------------

DIMENSION = 3
OPTIONS = {"c2st": {"steps": 40}, "kernel": {"subsets": 5, "subset_size": 20}, "inception-score": {"splits": 2}}
OF_FEATURES = [name for name, line in METRICS.items() if line.needs not in ("values", "fields")]
every_metric = pytest.mark.parametrize("name", OF_FEATURES)


def value(name, features):
    """The values of a metric, and those of its errors."""
    line = METRICS[name]
    real = normal(50, DIMENSION, 1) + 0.2
    reference = Statistics(real.mean(0), torch.cov(real.T), 50, "exact", "1", "none", features=real)
    metric = Metric(partial(line.function, **OPTIONS.get(name, {})), line.figures, needs=line.needs)
    return [value for figure in metric(Extracted(features, features), reference).values() for value in figure if value]


@pytest.mark.slow
@every_metric
def test_the_order_and_the_precision_of_features_do_not_matter(name):
    features = normal(64, DIMENSION)
    whole = value(name, features)
    shuffled = features[torch.randperm(64, generator=seed(2))]
    assert value(name, shuffled) == pytest.approx(whole, rel=1e-10)
    assert value(name, features.float()) == pytest.approx(whole, rel=1e-4)
    assert value(name, 3 * features + 1) != pytest.approx(whole, rel=1e-2)


@every_metric
def test_one_image_is_not_enough(name):
    if name == "classes":  # it is defined for one image
        assert all(number <= 1 for number in value(name, normal(1, DIMENSION)))
        return
    with pytest.raises(ValueError, match=r"at least [25]|at least subset_size = 20|more than k = [35]|2 .D . 1. = 8"):
        value(name, normal(1, DIMENSION))


@every_metric
def test_a_line_of_the_table_says_what_the_metric_needs(name):
    """With one image fewer it cannot be measured."""
    line = METRICS[name]
    reference = gaussian(torch.zeros(DIMENSION), torch.eye(DIMENSION))
    seen = Extracted(normal(5, DIMENSION), normal(5, 4))
    if line.needs in ("features", "equal"):
        assert "needs the features of the reference" in line.lacks(10**6, seen, reference)
        features = normal(2000, DIMENSION)
        reference = Statistics(reference.mean, reference.covariance, 2000, "exact", "1", "none", features=features)
    least = line.least({"logits": 4}.get(line.needs, DIMENSION)) if callable(line.least) else line.least
    assert line.lacks(least, seen, reference) is None
    assert f"needs at least {least:,} images" in line.lacks(least - 1, seen, reference)
    of_arrays = name in ("sliced-wasserstein", "energy", "mmd", "c2st")
    assert line.default == (None if name == "classes" else "arrays" if of_arrays else "pictures")
    assert set(line.settings) <= {"directions", "folds", "steps", "subsets", "subset_size", "splits", "k", "confident"}


@pytest.mark.parametrize("kind", [Moments, Rows])
def test_invalid_features_raise(kind):
    seen = kind()
    seen.update(normal(8, DIMENSION))
    with pytest.raises(ValueError, match="features have 7 dimensions, but those before have 3"):
        seen.update(normal(8, 7))
    wrong = normal(8, DIMENSION)
    wrong[3, 1], wrong[5, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="2 of the 8 rows hold NaN or infinity, the first at row 3"):
        seen.update(wrong)
    with pytest.raises(TypeError, match=r"must be floating point, got torch.uint8"):
        seen.update(torch.zeros(8, DIMENSION, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"must be \(N, D\), one row per image, .* got shape \(8, 3, 1\)"):
        seen.update(normal(8, DIMENSION)[..., None])
    with pytest.raises(ValueError, match="with N and D at least 1"):
        seen.update(normal(0, DIMENSION))
    with pytest.raises(TypeError, match=r"must be a tensor .N, D., got list"):
        seen.update([1.0])


def test_references_with_features():
    features = normal(30, 3)
    held = Statistics(features.mean(0), torch.cov(features.T), 30, "exact", "1", "none", features=features)
    a = normal(30, 3, 1)
    assert precision_recall(a, held) == precision_recall(a, features)
    assert kernel_distance(a, held, subset_size=10) == kernel_distance(a, features, subset_size=10)
    with pytest.raises(ValueError, match=r"reference must be features.* statistics_of\(..., keep_features=True"):
        density_coverage(a, gaussian(features.mean(0), torch.cov(features.T)))


def test_nothing_is_drawn_from_the_global_generator():
    before = torch.get_rng_state()
    for name in OF_FEATURES:
        value(name, normal(64, DIMENSION))
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_are_not_kept():
    moments = moments_of(normal(9, 2).requires_grad_())
    assert not moments.mean.requires_grad


PROCESSES = """
    import os, torch, torch.distributed as dist
    torch.set_num_threads(1)
    from scorematch.evaluation.accumulate import Moments, Rows
    from tests.test_metrics import DIMENSION, normal

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    features = normal(64, DIMENSION)
    for share in ([features[:20], features[20:]], [features, None]):  # uneven, and one process without features
        moments, rows = Moments(), Rows()
        if share[rank] is not None:
            moments.update(share[rank])
            rows.update(share[rank])
        moments = moments.reduce()
        assert torch.equal(rows.gather(), features) and moments.n == 64
        torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.covariance, torch.cov(features.T), rtol=1e-12, atol=1e-12)
    moments = Moments()
    moments.update(normal(5, DIMENSION + rank))
    try:
        moments.reduce()
    except ValueError as error:
        assert "features have 4 dimensions, but those before have 3" in str(error)
    else:
        raise AssertionError
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed, "init_process_group"), reason="torch.distributed is not built")
def test_two_processes_equal_one(forks, tmp_path):
    forks.group(2, textwrap.dedent(PROCESSES), tmp_path)
