"""Diagnostics: scores and samplers against closed forms, and restoration against known posteriors."""

import itertools
import json
import math
import textwrap
from typing import get_args

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.processes import process_group
from scorematch.evaluation import (
    Estimate,
    Evaluator,
    level_losses,
    posterior_calibration,
    sampler_distance,
    sampler_distances,
    score_error,
    values,
)
from scorematch.evaluation import calibration as calibrations
from scorematch.evaluation.calibration import Calibration
from scorematch.evaluation.exact import Empirical, Gaussian, GaussianMixture
from scorematch.evaluation.per_image import values_per_image
from scorematch.evaluation.sampler_distance import sampler_variants
from scorematch.loss import loss_and_norm
from scorematch.restoration import JPEG, Mask, Matrix, Observation, Uncrop, as_operator
from scorematch.restoration.methods import Restore
from scorematch.sampling import SAMPLERS, ODESampler, bulk_samples
from tests.helpers import gaussian_images, seed

SHAPE = (48,)
SIGMAS = [3.0, 0.5, 0.1]
LEVELS = NoiseSchedule.geometric(8, 0.05, 20)


@pytest.fixture(scope="module")
def images():
    """A Gaussian, and samples of it."""
    world = gaussian_images(SHAPE)
    return world, world.sample(300, 1)


def near(figure, expected, errors=5):
    return abs(figure.value - expected) < errors * figure.error


def times(factor, score):
    return lambda x, sigma, *condition: factor * score(x, sigma)


# -- The error of a score


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "empirical"])
def test_the_exact_score_has_no_error(kind, images):
    world = {
        "gaussian": images[0],
        "mixture": GaussianMixture([0.3, 0.7], torch.randn(2, 48, generator=seed()), 0.1, SHAPE),
        "empirical": Empirical(images[1]),
    }[kind]
    rows = score_error(world, world, SIGMAS, n=20, progress=False)
    assert [row.sigma for row in rows] == SIGMAS
    assert all(row.excess == row.relative == (0, 0) and row.denoised == 0 for row in rows)


def test_the_error_of_a_scaled_score_has_its_closed_form(images):
    """For 1.1 s* the relative error is 0.01. E |sigma s*|^2 is the sum of sigma^2 / (lambda + sigma^2)."""
    world = images[0]
    for row in score_error(times(1.1, world), world, SIGMAS, n=300, progress=False):
        norm = float((row.sigma**2 / (world.values + row.sigma**2)).mean())
        assert row.relative.value == pytest.approx(0.01, rel=1e-4) and near(row.excess, 0.01 * norm)
        assert row.excess.error == pytest.approx(0.01 * norm * math.sqrt(2 / 48 / 300), rel=0.5)
        assert row.denoised == pytest.approx(row.sigma * math.sqrt(row.excess.value))


def test_the_error_of_the_relative_error_is_that_of_a_ratio(images):
    """For a constant error the relative error of the ratio is that of its denominator, a mean of squares."""
    world = images[0]
    (row,) = score_error(lambda x, sigma: world(x, sigma) + 0.3, world, [0.5], n=300, progress=False)
    assert row.excess.value == pytest.approx((0.5 * 0.3) ** 2, rel=1e-5) and row.excess.error < 1e-8
    share = 0.5**2 / (world.values + 0.5**2)
    spread = float((2 * share.square().sum()).sqrt() / share.sum()) / math.sqrt(300)
    assert row.relative.error == pytest.approx(spread * row.relative.value, rel=0.3)


def test_equal_samples_have_different_noise():
    """The samples of an Empirical repeat; of one image, the error is that of independent noise."""
    world = Empirical(torch.tensor([[1.0, 2.0]]))
    (row,) = score_error(times(1.1, world), world, [1.0], n=400, progress=False)
    assert near(row.excess, 0.01) and row.excess.error == pytest.approx(0.01 / math.sqrt(400), rel=0.3)


def test_the_error_is_the_excess_of_the_loss(images):
    world, data = images
    options = {"levels": SIGMAS, "progress": False}
    errors = score_error(times(1.2, world), world, x=data, **options)
    losses, least = (level_losses(score, data, n=None, **options) for score in (times(1.2, world), world))
    for error, loss, floor in zip(errors, losses, least, strict=True):
        excess = loss.loss.value - floor.loss.value
        assert abs(excess - error.excess.value) < 5 * 0.2 * 2 * math.sqrt(1 / 48 / 300)


def test_levels_are_those_of_the_schedule_unless_given(images):
    world = images[0]
    with_levels = Gaussian.like(world)
    with_levels.schedule = LEVELS
    rows = score_error(times(1, world), with_levels, n=2, progress=False)
    assert len(rows) == 16 and (rows[0].sigma, rows[-1].sigma) == pytest.approx((8, 0.05))
    assert len(score_error(world, world, LEVELS, n=2, progress=False)) == 20
    with pytest.raises(ValueError, match="the score has no noise levels of its own: pass levels"):
        score_error(world, world, progress=False)


def test_the_class_is_passed_to_the_score(images):
    world, seen = images[0], []

    def score(x, sigma, condition):
        seen.append(condition)
        return world(x, sigma)

    score_error(score, world, [1.0], n=2, condition=3, progress=False)
    level_losses(score, images[1], [1.0], n=2, condition=4, progress=False)
    assert [each.tolist() for each in seen] == [[3, 3], [4, 4]]


# -- Loss and norm by level


def test_loss_and_norm_are_the_loss_and_the_norm(images):
    world, x, z = images[0], images[1][:5], torch.randn(5, *SHAPE, generator=seed())
    loss, norm = loss_and_norm(world, x, sigma=0.7, noise=z)
    torch.testing.assert_close(loss, dsm_loss(world, x, sigma=0.7, noise=z, reduction="none") / 24)
    torch.testing.assert_close(norm, (0.7 * world(x + 0.7 * z, 0.7)).square().flatten(1).mean(1))
    left = torch.arange(48) < 24
    inside, size = loss_and_norm(world, x, sigma=0.7, noise=z, mask=left)
    expected = dsm_loss(world, x, sigma=0.7, noise=z, reduction="none", mask=left) / 24
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(size, (0.7 * world(x + 0.7 * z, 0.7))[:, :24].square().flatten(1).mean(1))
    by_seed = [loss_and_norm(world, x, sigma=0.7, generator=1) for _ in range(2)]
    assert torch.equal(by_seed[0][0], by_seed[1][0])


def test_the_loss_of_the_exact_score_has_its_closed_form_and_is_calibrated(images):
    world, data = images
    exact, doubled = (level_losses(score, data, SIGMAS, progress=False) for score in (world, times(2, world)))
    for row, wrong in zip(exact, doubled, strict=True):
        expected = float((world.values / (world.values + row.sigma**2)).mean())
        assert near(row.loss, expected) and near(row.norm, 1 - expected) and near(row.calibration, 0)
        assert row.denoised == pytest.approx(row.sigma * math.sqrt(row.loss.value))
        assert row.calibration.value == pytest.approx(row.loss.value + row.norm.value - 1, abs=1e-6)
        # E |2 sigma s + z|^2 = 4 N - 4 N + 1, in units of D.
        assert (
            near(wrong.loss, 1) and near(wrong.norm, 4 * (1 - expected)) and near(wrong.calibration, 4 - 4 * expected)
        )


def scaled_denoiser(a, score):
    """The score whose denoised images are those of another, times a."""
    return lambda x, sigma: ((a - 1) * x + a * sigma.view(-1, 1) ** 2 * score(x, sigma)) / sigma.view(-1, 1) ** 2


def test_the_slope_and_the_bias_of_the_denoised_images_have_their_closed_form(images):
    """The slope of x on a E[x | x + sigma z] is 1 / a, and the bias is (a - 1) E x, at low and at high levels."""
    world, data = images
    sigmas = [25.0, 1.0, 0.1]
    for a in (1, 0.8, 1 / 0.65):
        rows = level_losses(scaled_denoiser(a, world), data, sigmas, n=None, progress=False)
        for row in rows:
            assert near(row.slope, 1 / a, errors=4) and row.slope.error < 0.1
            assert near(row.bias, (a - 1) * float(world.mean.mean()), errors=4)
    # At the highest level the norm does not show what the slope shows.
    assert near(rows[0].calibration, 0, errors=1) and not near(rows[0].slope, 1, errors=4)


@pytest.mark.slow
def test_the_errors_of_the_slope_and_the_bias_are_their_standard_deviations():
    world = gaussian_images((12,))
    found = [level_losses(world, world.sample(60, i), [1.0], n=None, seed=i, progress=False)[0] for i in range(100)]
    for name in ("slope", "bias"):
        figures = [getattr(row, name) for row in found]
        deviation = float(torch.tensor([figure.value for figure in figures]).std())
        assert sum(figure.error for figure in figures) / 100 == pytest.approx(deviation, rel=0.25)


def test_the_order_of_the_images_and_the_batches_do_not_matter(images):
    world, data = images[0], images[1][:50]
    known = level_losses(world, data, SIGMAS, n=None, progress=False)
    for other, batch_size in ((data.flip(0), 64), (data, 7)):
        found = level_losses(world, other, SIGMAS, n=None, batch_size=batch_size, progress=False)
        for a, b in zip(known, found, strict=True):
            assert [*a.loss, *a.norm, *a.slope] == pytest.approx([*b.loss, *b.norm, *b.slope], rel=1e-6)
    other = level_losses(world, data, SIGMAS, n=None, seed=1, progress=False)
    assert other[0].loss.value != known[0].loss.value


def test_equal_images_have_different_noise():
    """The loss of a score of zero is the mean of z^2, with the error of independent noise, in batches of any size."""
    data = torch.full((1000, 1, 1, 1), 0.5)
    (row,), (other,) = (
        level_losses(lambda x, sigma: 0 * x, data, [1.0], n=None, batch_size=size, progress=False) for size in (64, 300)
    )
    assert near(row.loss, 1) and row.loss.error == pytest.approx(math.sqrt(2 / 1000), rel=0.2)
    assert near(row.bias, 0) and row.bias.error == pytest.approx(math.sqrt(1 / 1000), rel=0.2)
    assert other == row


def test_conditions_are_computed_from_images_and_labels(images):
    pairs, seen = (torch.rand(4, 1, 2, 2, generator=seed()), torch.tensor([3, 1, 0, 2])), []

    def score(x, sigma, condition):
        seen.append(condition)
        return torch.zeros_like(x)

    from scorematch.data import open_images

    data = open_images(pairs, labels=True)
    rows = level_losses(score, data, [1.0], n=None, condition=lambda x, labels: labels + x[:, 0, 0, 0], progress=False)
    expected = pairs[1] + pairs[0][:, 0, 0, 0]
    torch.testing.assert_close(seen[0].sort().values, expected.sort().values)
    assert rows[0].norm == (0, 0)


def test_networks_are_evaluated_in_eval_mode_without_gradients():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=LEVELS).train()
    rows = level_losses(net, torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8), progress=False)
    assert len(rows) == 16 and net.training and all(each.grad is None for each in net.parameters())
    assert rows[0].sigma == 8 and all(math.isfinite(row.loss.value) for row in rows)


def test_tables_of_levels(images):
    world = images[0]
    losses = level_losses(world, images[1], SIGMAS, n=5, progress=False)
    lines = losses.table().splitlines()
    assert lines[0] == "| sigma | loss | norm | calibration | denoised | slope | bias |" and len(lines) == 5
    assert lines[2].startswith("| 3 | ") and " ± " in lines[2]
    errors = score_error(times(2, world), world, SIGMAS, n=3, progress=False)
    assert errors.table().startswith("| sigma | ") and len(errors.table().splitlines()) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda world, x: score_error(world, world, [], progress=False), "at least one noise level, all positive"),
        (lambda world, x: score_error(world, world, [1.0, 0.0], progress=False), "positive and finite, got .*0.0"),
        (lambda world, x: score_error(world, world, [1.0], n=1, progress=False), "at least 2 samples, got 1"),
        (lambda world, x: level_losses(world, x, [1.0], n=1, progress=False), "n must be from 2 to .*300, got 1"),
        (
            lambda world, x: level_losses(world, x, [1.0], batch_size=0, progress=False),
            "batch_size must be an integer of at least 1",
        ),
        (
            lambda world, x: level_losses(times(math.nan, world), x, [1.0], progress=False),
            r"loss by level: image \d+ has the values \[nan, .*nan\], which are not finite",
        ),
        (lambda world, x: score_error(lambda x, s: x[:1], world, [1.0], progress=False), "must have the shape of x"),
    ],
)
def test_invalid_arguments_of_diagnostics_raise(call, message, images):
    with pytest.raises(ValueError, match=message):
        call(*images)


# -- Samplers


class Drawn:
    """In place of a sampler: samples of a distribution, changed by a function."""

    def __init__(self, world, change=lambda x: x):
        self.world, self.change = world, change

    def __len__(self):
        return 1

    def sample(self, n, *, shape, generator, progress):
        return self.change(self.world.sample(n, generator))


def distances(world, change=lambda x: x, **options):
    options = {"n": 500, "levels": (2,), "progress": False, **options}
    return sampler_distances(world, {"drawn": lambda net, levels: Drawn(world, change)}, **options)


DISTANCES = ("mean", "covariance", "energy")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_the_distance_of_an_exact_sampler_is_within_its_monte_carlo_error(kind, world, mixture):
    exact = {"gaussian": world, "mixture": mixture}[kind]
    for number in range(3):
        found, floor = distances(exact, seed=number)
        assert floor.name == "exact samples" and floor.calls is None
        for name in DISTANCES:
            value, deviation = getattr(floor, name)
            assert abs(getattr(found, name).value - value) < 5 * deviation


def test_the_distance_of_shifted_and_of_scaled_samples(world):
    shifted, floor = distances(world, lambda x: x + torch.tensor([0.0, 3.0, 0.0]))
    assert shifted.mean.value == pytest.approx(3 / math.sqrt(0.9), rel=0.05)
    scaled, _ = distances(world, lambda x: world.mean.float() + 2 * (x - world.mean.float()))
    assert scaled.covariance.value == pytest.approx(3, rel=0.3) and scaled.mean.value < 0.3
    for found in (shifted, scaled):
        assert found.energy.value > floor.energy.value + 10 * floor.energy.error


def test_the_energy_distance_finds_what_mean_and_covariance_do_not(mixture):
    """A Gaussian with the moments of the mixture."""
    like = Gaussian.like(mixture)
    found, floor = sampler_distances(
        mixture, {"like": lambda net, levels: Drawn(like)}, levels=(2,), n=500, progress=False
    )
    z = [(getattr(found, name).value - getattr(floor, name).value) / getattr(floor, name).error for name in DISTANCES]
    assert abs(z[0]) < 5 and abs(z[1]) < 5 and z[2] > 10


def test_the_energy_distance_equals_brute_force(world, monkeypatch):
    monkeypatch.setattr("scorematch.evaluation.distances.BLOCK", 7)
    x, y = world.sample(20, 1, torch.float64) + 0.5, world.sample(30, 2, torch.float64)
    _, _, found = sampler_distance._distances_from(world, y)(x)
    between, a, b = (torch.cdist(*pair).mean() for pair in ((x, y), (x, x), (y, y)))
    assert found == pytest.approx(float((1 - (a + b) / (2 * between)).sqrt()), rel=1e-9)


def test_every_sampler_and_every_named_option_has_a_variant(world):
    world.schedule = LEVELS
    names = sampler_variants(world)
    assert set(SAMPLERS) == {name.split(",")[0] for name in names}
    assert {"langevin", "langevin, plain", "ode, heun", "ode, dpm-solver++", "ancestral, large"} <= names.keys()
    assert "ancestral, learned" not in names  # the score predicts no variance
    for name, make in names.items():
        sampler = make(world, 6)
        assert isinstance(sampler, SAMPLERS[name.split(",")[0]]) and len(sampler.schedule) == 6 and not sampler.clamp
    net = ScoreNet(torch.nn.Conv2d(1, 2, 1), LEVELS, sample_shape=(1, 2, 2), predicts_variance=True)
    assert sampler_variants(net).keys() == names.keys() | {"ancestral, learned"}


@pytest.mark.slow
def test_distances_of_all_samplers_fall_with_the_number_of_calls(world):
    world.schedule = NoiseSchedule.geometric(8, 0.05, 20)
    found = sampler_distances(world, levels=(4, 40), n=400, repeats=5, progress=False)
    *rows, floor = found
    assert len(rows) == 2 * len(sampler_variants(world))
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        assert few.name == many.name and few.calls < many.calls
        assert many.energy.value < max(0.7 * few.energy.value, 2 * floor.energy.value), few.name
    table = found.table().splitlines()
    assert len(table) == 2 + len(rows) + 1 and table[-1].startswith("| exact samples |") and "±" in table[-1]


def test_the_same_seed_gives_the_same_distances(world):
    world.schedule = LEVELS
    make = {"ode, heun": sampler_variants(world)["ode, heun"]}
    options = {"levels": (3,), "n": 20, "repeats": 2, "progress": False}
    a, b, c = (sampler_distances(world, make, seed=number, **options) for number in (0, 0, 1))
    assert a == b != c


def test_another_score_than_the_exact_one_can_be_sampled(world):
    world.schedule = LEVELS
    wrong = Gaussian(world.mean + 5, world.covariance, schedule=LEVELS)
    make = {"ode": sampler_variants(world)["ode, heun"]}
    found = sampler_distances(world, make, net=wrong, levels=(10,), n=100, repeats=2, progress=False)
    assert found[0].mean.value == pytest.approx(5 * math.sqrt(3 / 0.9), rel=0.1)


def test_invalid_arguments_of_sampler_distances_raise(world):
    for point in (Gaussian([1.0, 2.0], 0.0, schedule=LEVELS), Empirical(torch.ones(3, 2), schedule=LEVELS)):
        with pytest.raises(ValueError, match="exact must not be a single point"):
            sampler_distances(point)
    with pytest.raises(ValueError, match="n must be an integer of at least 2, got 1"):
        sampler_distances(world, n=1)
    with pytest.raises(ValueError, match="repeats must be an integer of at least 2, got 1"):
        sampler_distances(world, repeats=1)
    with pytest.raises(ValueError, match="the score has no noise levels of its own: pass a schedule"):
        sampler_distances(world, n=2, progress=False)


# -- Restoration

LEFT = Mask(torch.arange(4) < 2)
FLAT = (1, 2, 4)


def small(kind, **options):
    root = torch.randn(8, 8, generator=seed(4), dtype=torch.float64)
    covariance = root @ root.T / 8 + 0.1 * torch.eye(8)
    if kind == "gaussian":
        return Gaussian(torch.zeros(8), covariance, FLAT, **options)
    return GaussianMixture([0.6, 0.4], [[1.0] * 8, [-1.0] * 8], covariance, FLAT, **options)


class Posterior:
    """In place of a sampler: draws from the known posterior, changed by a function of draws, mean and deviations."""

    def __init__(self, world, change):
        self.world, self.change = world, change

    def sample(self, n, *, observation, generator, progress):
        drawn = []
        for _, group in itertools.groupby(range(n), lambda i: observation.y[i].tolist()):
            rows = list(group)
            posterior = self.world.posterior(observation, rows[0])
            x = posterior.sample(len(rows), generator + rows[0])
            drawn.append(self.change(x, posterior.mean.view(FLAT).float()))
        return torch.cat(drawn)


def calibrated(world, change=None, **options):
    samplers = {} if change is None else {"changed": Posterior(world, change)}
    return posterior_calibration(world, LEFT, samplers, sigma=0.3, progress=False, **options)[-1]


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_draws_from_the_posterior_are_calibrated(kind):
    found = calibrated(small(kind), observations=200, draws=19)
    assert found.name == "posterior" and found.ranks.shape == (200, 8) and found.draws == 19
    assert (found.ranks.min(), found.ranks.max()) == (0, 19)
    for i in range(1, 10):
        nominal, share = found.coverage(i)
        assert nominal == pytest.approx(1 - i / 10) and near(share, nominal)
    assert near(found.spread, 1) and found.shift < 0.1 and found.p_value > 1e-3


OPERATORS = ["pool:2", "blur:0.7", "resize:2", "fourier:2", "uncrop:left=1", "uncrop:left=1 @ pool:2"]


@pytest.mark.parametrize(
    "operator", [as_operator(text) for text in OPERATORS] + [Matrix(torch.randn(3, 64, generator=seed(5)))], ids=str
)
@pytest.mark.parametrize("components", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_posteriors_of_64_values_are_calibrated_for_every_linear_operator(operator, components):
    """The covariance falls off as that of natural images, with the inverse square of the frequency."""
    frequency = torch.fft.fftfreq(8, 1 / 8).square()
    power = 1 / (1 + frequency[:, None] + frequency)
    units = torch.eye(64).view(64, 8, 8)
    covariance = torch.fft.ifft2(torch.fft.fft2(units) * power).real.reshape(64, 64).double()
    means = torch.randn(components, 64, generator=seed(2), dtype=torch.float64)
    world = GaussianMixture([1.0] * components, means, covariance, (1, 8, 8))
    (found,) = posterior_calibration(world, operator, {}, sigma=0.1, observations=60, draws=9, progress=False)
    assert near(found.spread, 1) and near(found.coverage(1)[1], 0.8) and found.p_value > 1e-3


def correlated(values):
    """The product with the inverse of 0.09 (I + 1/8), a covariance of neighboring values of eight."""
    return (values - values.mean((1, 2, 3), keepdim=True) / 2) / 0.09


@pytest.mark.slow
@pytest.mark.parametrize(
    "sigma",
    [torch.linspace(0.1, 0.9, 4), torch.tensor([0.1, 0.1, 0.1, math.inf]), correlated],
    ids=["levels", "not measured", "covariance"],
)
def test_draws_are_calibrated_for_every_kind_of_noise(sigma):
    world, whole = small("gaussian"), Mask(torch.ones(4, dtype=torch.bool))
    samplers = {
        "draws": Posterior(world, lambda x, mean: x),
        "narrow": Posterior(world, lambda x, mean: mean + 0.6 * (x - mean)),
    }
    exact, draws, narrow = posterior_calibration(
        world, whole, samplers, sigma=sigma, observations=200, draws=19, progress=False
    )
    for found in (exact, draws):
        assert found.p_value > 1e-3 and near(found.spread, 1)
    assert narrow.p_value < 1e-3 and near(narrow.spread, 0.6)


@pytest.mark.slow
def test_methods_that_refuse_the_noise_are_left_out():
    world = Gaussian(torch.zeros(8), 1.0, FLAT, schedule=NoiseSchedule.geometric(4, 0.02, 4))
    found = posterior_calibration(world, LEFT, sigma=lambda v: 9 * v, observations=30, draws=2, progress=False)
    names = [each.name for each in found]
    assert names[0] == "posterior" and "guide" not in names


@pytest.mark.slow
def test_overconfident_draws_are_found_with_their_spread():
    found = calibrated(small("gaussian"), lambda x, mean: mean + 0.5 * (x - mean), observations=500, draws=19)
    assert near(found.spread, 0.5) and found.shift < 0.1 and found.p_value < 1e-6
    _, share = found.coverage(1)
    # With K draws at half the deviation the coverage follows from the ranks of N(0, 1) among N(0, 1/4).
    z = torch.randn(100_000, 20, generator=seed(), dtype=torch.float64)
    rank = (0.5 * z[:, 1:] < z[:, :1]).sum(1)
    assert near(share, float(((rank >= 1) & (rank <= 18)).double().mean()))


@pytest.mark.slow
def test_shifted_draws_are_found_with_their_shift():
    world = small("gaussian")
    found = calibrated(world, lambda x, mean: x + 0.4, observations=200, draws=19)
    w = torch.randn(8, 8, generator=seed(calibrations.seed_of(0, "directions")))
    w = (w / w.norm(dim=0)).double()
    y = LEFT.measure(torch.zeros(1, *FLAT))
    covariance = world.posterior(Observation(LEFT, y, 0.3)).covariance
    expected = (0.4 * w.sum(0)).square() / (covariance @ w * w).sum(0)
    assert found.shift == pytest.approx(float(expected.mean().sqrt()), rel=0.1) and near(found.spread, 1)
    assert found.p_value < 1e-4


def test_ranks_of_equal_values_are_drawn_at_random():
    """If draws and truth agree, all ranks are equally probable."""
    draws = torch.zeros(200, 3, 2, dtype=torch.float64)
    found = calibrations._calibration("ties", draws, draws[:, 0], draws[:, 0], 1 + draws[:, 0], 0)
    assert found.p_value > 1e-3 and found.ranks.unique().tolist() == [0, 1, 2, 3]


def test_the_error_of_the_spread_is_that_of_the_jackknife():
    values = torch.randn(100, 3, 2, generator=seed(), dtype=torch.float64)
    variance = torch.tensor([0.5, 2.0]).double().expand(100, 2)
    ratios = (values.var(1) / variance).mean(1)
    spread = ((ratios.sum() - ratios) / 99).sqrt()  # without one of the observations
    found = calibrations._calibration("draws", values, values[:, 0], 0 * variance, variance, 0).spread
    assert found.value == pytest.approx(float(ratios.mean().sqrt()))
    assert found.error == pytest.approx(float(spread.std()) * 99 / 10, rel=0.02)


def test_the_p_value_is_that_of_the_chi_squared_test_times_the_number_of_directions():
    ranks = torch.tensor([0] * 12 + [1] * 6 + [2] * 6)
    for count in (1, 3):
        found = Calibration("", 2, ranks[:, None].expand(-1, count), Estimate(1.0), 0.0)
        statistic = (4**2 + 2**2 + 2**2) / 8  # with two degrees of freedom
        assert found.p_value == pytest.approx(count * math.exp(-statistic / 2))
    assert Calibration("", 2, ranks[:, None].expand(-1, 9), Estimate(1.0), 0.0).p_value == 1


@pytest.mark.slow
def test_every_method_of_restore_is_measured():
    world = Gaussian(torch.zeros(8), 1.0, FLAT, schedule=NoiseSchedule.geometric(8, 0.02, 4))
    few = {"sigma": 0.3, "observations": 50, "draws": 9, "progress": False}
    found, again = (posterior_calibration(world, LEFT, **few) for _ in range(2))
    assert [each.name for each in found] == ["posterior", *get_args(Restore)]
    rows = found.table().splitlines()
    assert "nominal 60.0%" in rows[0] and "nominal 80.0%" in rows[0]
    assert len(rows) == 3 + len(get_args(Restore)) and rows[2].startswith("| posterior |")
    assert all(torch.equal(a.ranks, b.ranks) for a, b in zip(found, again, strict=True))


@pytest.mark.slow
def test_every_method_is_near_the_posterior_of_white_data():
    world = Gaussian(torch.zeros(8), 1.0, FLAT, schedule=NoiseSchedule.geometric(8, 0.02, 30))
    for each in posterior_calibration(world, LEFT, sigma=0.3, observations=100, draws=9, progress=False):
        assert each.spread.value == pytest.approx(1, abs=0.15) and each.shift < 0.2, each.name


@pytest.mark.slow
def test_the_calibration_does_not_depend_on_the_default_dtype():
    ranks = calibrated(small("gaussian"), observations=100).ranks
    torch.set_default_dtype(torch.float64)
    try:
        again = calibrated(small("gaussian"), observations=100).ranks
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 1}, "draws must be an integer of at least 2, got 1"),
        ({"directions": 0}, "directions must be an integer of at least 1, got 0"),
        ({"observations": 99}, "the ranks of 19 draws need at least 100 observations, got 99"),
        ({"operator": Mask(torch.ones(2, 1, 2, 4) > 0)}, "must be for any image, got one for 2 images"),
        ({"operator": JPEG(50)}, "the operator must be linear"),
        ({"sigma": torch.ones(3)}, r"sigma must broadcast to y of shape \(100, 1, 2, 4\), got shape \(3,\)"),
        ({"operator": Uncrop(), "sigma": 0.0}, "the observations determine the images completely"),
    ],
)
def test_invalid_arguments_of_posterior_calibration_raise(arguments, message):
    options = {"operator": LEFT, "sigma": 0.1, "progress": False, "samplers": {}, "observations": 100, **arguments}
    with pytest.raises(ValueError, match=message):
        posterior_calibration(small("gaussian"), **options)


def test_a_coverage_of_more_draws_than_there_are_raises():
    with pytest.raises(ValueError, match="i must be from 1 to 9 for 19 draws, got 10"):
        calibrated(small("gaussian"), observations=100).coverage(10)


# -- Processes


def test_values_of_images_are_in_the_order_of_the_indices():
    data = torch.rand(10, 2, generator=seed())
    indices = torch.tensor([7, 1, 9, 0, 2])
    found = values_per_image(
        lambda batch: batch.x * 2, lambda i: (data[i], None), indices, batch_size=2, title="t", progress=False
    )
    torch.testing.assert_close(found, 2 * data[indices].double())


PROCESSES = """
    import torch, torch.distributed as dist
    torch.set_num_threads(1)
    from tests.test_diagnostics import measured

    dist.init_process_group("gloo")
    print(measured())
    dist.barrier()
    dist.destroy_process_group()
"""


def measured():
    """Everything that is computed over all processes; one process gets no batch of the last."""
    from scorematch.evaluation.data_likelihood import data_likelihood

    world = gaussian_images((1, 2, 2), variance=0.05)
    data = torch.rand(11, 1, 2, 2, generator=seed()).mul(255).round() / 255
    data[[4, 10]] = data[0].clone()  # equal images in different batches
    options = {"batch_size": 3, "progress": False}
    likelihood = data_likelihood(world, data, NoiseSchedule.karras(20, 0.01, 10), checks=3, **options)
    return [
        *likelihood.per_image.tolist(),
        *likelihood.bits,
        likelihood.trace_error,
        *likelihood.change,
        *itertools.chain(*level_losses(world, data, [1.0], **options)[0][-2:]),
        *(value for row in level_losses(world, data, [1.0], **options) for value in row.loss + row.norm),
        *(value for row in score_error(times(1.1, world), world, [1.0], n=2, **options) for value in row.excess),
    ]


LAUNCHED = """
    from tests.test_diagnostics import compared, measured
    print(measured() + compared())
"""


def compared():
    """The figures of two samplers."""
    world = Gaussian([0.5] * 4, 0.05, (1, 2, 2), schedule=LEVELS, value_range=(0, 1))
    evaluator = Evaluator(torch.rand(9, 1, 2, 2, generator=seed()), features="pixels", cache=False, progress=False)
    found = []
    for levels in (3, 5):
        with process_group("cpu"):
            images = (batch.images for batch in bulk_samples(ODESampler(world, levels=levels), 11, batch_size=3))
            found += values(evaluator.measure(images)).values()
    return found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed, "init_process_group"), reason="torch.distributed is not built")
def test_processes_that_torchrun_starts_equal_one(forks, tmp_path):
    for _, printed, _ in forks.group(2, textwrap.dedent(LAUNCHED), tmp_path):
        assert json.loads(printed) == pytest.approx(measured() + compared(), rel=1e-9, abs=1e-12)


def test_processes_without_a_process_group_raise(monkeypatch):
    evaluator = Evaluator(torch.rand(9, 1, 2, 2, generator=seed()), features="pixels", cache=False, progress=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"2 processes were started, and must form a process group .*Call torch\."):
        evaluator.measure([torch.rand(9, 1, 2, 2)])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.distributed, "init_process_group"), reason="torch.distributed is not built")
def test_two_processes_equal_one(forks, tmp_path):
    for _, printed, _ in forks.group(2, textwrap.dedent(PROCESSES), tmp_path):
        assert json.loads(printed) == measured()


@pytest.mark.cuda
def test_diagnostics_on_a_device_equal_those_on_the_cpu():
    """For a network, and a distribution, on either device."""
    world = gaussian_images((1, 8, 8))
    there = Gaussian(world.mean.cuda(), world.covariance.cuda(), (1, 8, 8))
    x = world.sample(4, 0)
    for distribution, points in ((there, x), (world, x.cuda()), (there, x.cuda())):
        found = distribution(points, 0.5)
        assert found.device == points.device
        torch.testing.assert_close(found.cpu(), world(x, 0.5), rtol=1e-5, atol=1e-5)
    data = torch.randint(256, (10, 1, 8, 8), generator=seed(), dtype=torch.uint8)
    empirical = [Empirical(each)(x, 0.1) for each in (data, data.cuda())]
    torch.testing.assert_close(*empirical, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8, 8), schedule=LEVELS)
    torch.nn.init.normal_(net.backbone.conv_out.weight, std=0.1)
    results = []
    for device in ("cpu", "cuda"):
        net.to(device)
        losses = level_losses(net, data, SIGMAS, progress=False)
        errors = score_error(net, world, SIGMAS, n=4, progress=False)
        results.append([value for row in losses for value in row.loss] + [row.excess.value for row in errors])
    assert results[0] == pytest.approx(results[1], rel=1e-3)
