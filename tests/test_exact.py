"""Distributions with known scores: derivatives of their densities, torch's densities, and Bayes' rule."""

import math

import pytest
import torch
from torch import distributions

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation import exact as module
from scorematch.evaluation.exact import Empirical, Gaussian, GaussianMixture, operator_matrix
from scorematch.evaluation.measurement import noise_of
from scorematch.restoration import (
    JPEG,
    AveragePool,
    Fourier,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Mask,
    Matrix,
    Observation,
    Uncrop,
)
from scorematch.sampling import ODESampler
from tests.helpers import gaussian_images, run, seed

SHAPE = (3, 4, 4)
LEVELS = NoiseSchedule.geometric(5, 0.1, 10)


def normal(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


def mixture(shape=SHAPE, components=3):
    size = math.prod(shape)
    root = 0.3 * normal(size, size) / size**0.5
    weights = torch.arange(1.0, components + 1)
    return GaussianMixture(weights, normal(components, size, number=1), root @ root.T + 0.02 * torch.eye(size), shape)


WORLDS = {
    "gaussian": gaussian_images(SHAPE),
    "mixture": mixture(),
    "empirical": Empirical(normal(20, *SHAPE), 0.5),
    "data": Empirical(normal(20, *SHAPE)),
}
every_world = pytest.mark.parametrize("name", WORLDS)


@every_world
@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_the_score_is_the_gradient_of_the_log_density(name, sigma):
    world = WORLDS[name]
    x = (world.sample(5, 1, torch.float64) + sigma * normal(5, *SHAPE, number=2)).requires_grad_()
    (gradient,) = torch.autograd.grad(world.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(world(x, sigma), gradient, rtol=1e-9, atol=1e-9)


@every_world
def test_each_sample_has_its_own_level(name, rng):
    world, sigma = WORLDS[name], torch.tensor([0.2, 1.0, 1e9], dtype=torch.float64)
    x = normal(3, *SHAPE)
    for function in (world, world.log_density):
        expected = torch.cat([function(x[i : i + 1], float(sigma[i])) for i in range(3)])
        torch.testing.assert_close(function(x, sigma), expected, rtol=1e-12, atol=1e-12)


def test_parameters_that_are_differentiated_are_taken_as_constants():
    mean, covariance = torch.zeros(2).requires_grad_(), torch.eye(2).requires_grad_()
    mixture = GaussianMixture([1.0], mean[None], covariance)
    for world in (Gaussian(mean, covariance), mixture, Empirical(mean[None], 0.5)):
        assert not world(torch.ones(1, 2), 0.3).requires_grad, world


def test_densities_are_those_of_torch():
    world, x = WORLDS["mixture"], normal(5, *SHAPE, number=3)
    covariance = world._within + 0.5**2 * torch.eye(48)
    parts = distributions.MultivariateNormal(world.means, covariance)
    known = distributions.MixtureSameFamily(distributions.Categorical(world.weights), parts)
    torch.testing.assert_close(world.log_density(x, 0.5), known.log_prob(x.flatten(1)), rtol=1e-9, atol=1e-9)
    gaussian = WORLDS["gaussian"]
    known = distributions.MultivariateNormal(gaussian.mean, gaussian.covariance)
    torch.testing.assert_close(gaussian.log_density(x), known.log_prob(x.flatten(1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bandwidth", [0.0, 0.4])
def test_an_empirical_distribution_is_a_mixture_of_its_data(bandwidth, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 3)
    data = normal(10, *SHAPE)
    found = Empirical(data, bandwidth)
    known = GaussianMixture([0.1] * 10, data.flatten(1), bandwidth**2, SHAPE)
    x, sigma = normal(4, *SHAPE, number=1), torch.tensor([0.1, 0.5, 2, 9], dtype=torch.float64)
    torch.testing.assert_close(found(x, sigma), known(x, sigma), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.log_density(x, 0.3), known.log_density(x, 0.3), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.mean, known.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.covariance, known.covariance, rtol=1e-12, atol=1e-12)
    assert len(found) == 10 and found.sample_shape == SHAPE
    assert found.data_std == pytest.approx(known.data_std, rel=1e-12)


def test_restoration_with_an_empirical_distribution_is_that_of_the_mixture_of_its_data(monkeypatch):
    """In units with a deviation of 300, without the covariance, for which large images have no memory."""
    data = 300 * normal(20, *SHAPE)
    worlds = Empirical(data, 30.0), GaussianMixture([0.05] * 20, data.flatten(1), 900.0, SHAPE)
    monkeypatch.setattr(module, "Moments", None)
    observation = Observation(AveragePool(2), AveragePool(2).measure(data[:1]).float(), sigma=100.0)
    found = [
        run(
            ODESampler(world, NoiseSchedule.geometric(3000, 30, 6), restore="guide"),
            4,
            observation=observation,
            generator=0,
        )
        for world in worlds
    ]
    torch.testing.assert_close(*found, rtol=1e-4, atol=0.01)


def test_low_noise_leads_to_the_nearest_image_with_float32_inputs():
    """Differences of squares would lose all digits in float32: the exponents are around 1e7."""
    data = torch.randint(256, (50, 1, 8, 8), generator=seed(), dtype=torch.uint8)
    world, x = Empirical(data), data[7:9].float() / 255 + 1e-3 * torch.randn(2, 1, 8, 8, generator=seed(1))
    torch.testing.assert_close(x + 1e-3**2 * world(x, 1e-3), data[7:9].float() / 255, rtol=0, atol=1e-6)


def test_results_have_the_dtype_of_x():
    for world in WORLDS.values():
        x = normal(2, *SHAPE).float()
        assert world(x, 0.5).dtype == torch.float32 == world.log_density(x, 0.5).dtype == world.sample(2).dtype
        torch.testing.assert_close(world(x, 0.5), world(x.double(), 0.5).float(), rtol=1e-5, atol=1e-5)


@every_world
def test_samples_have_the_mean_and_the_covariance(name):
    world, n = WORLDS[name], 20_000
    x = world.sample(n, 5, torch.float64).flatten(1)
    deviations = world.covariance.diag().sqrt()
    assert ((x.mean(0) - world.mean).abs() < 5 * deviations / n**0.5).all()
    # The variance of a product of two normal values is at most 2; mixtures and data are lighter in their tails.
    error = (torch.cov(x.T) - world.covariance).abs() / (deviations[:, None] * deviations)
    assert error.max() < 6 * (2 / n) ** 0.5


def test_samples_depend_on_the_seed_only():
    for world in WORLDS.values():
        state = torch.get_rng_state()
        assert torch.equal(world.sample(3, 1), world.sample(3, seed(1)))
        assert not torch.equal(world.sample(3, 1), world.sample(3, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert world.sample(3).shape == (3, *SHAPE)


def test_a_gaussian_like_a_data_set():
    data = normal(100, *SHAPE)
    fitted = Gaussian.like(Empirical(data, schedule=LEVELS, value_range=(0, 1)))
    torch.testing.assert_close(fitted.mean, data.flatten(1).mean(0))
    torch.testing.assert_close(fitted.covariance, torch.cov(data.flatten(1).T, correction=0))
    assert (fitted.sample_shape, fitted.schedule, fitted.value_range) == (SHAPE, LEVELS, (0, 1))
    one = Gaussian.like(Empirical(data[:1], bandwidth=0.2))
    torch.testing.assert_close(one.mean, data[0].flatten().double())
    torch.testing.assert_close(one.covariance, 0.04 * torch.eye(data[0].numel(), dtype=torch.float64))


# -- Posteriors


OPERATORS = {
    "mask": Mask(torch.rand(4, 4, generator=seed(5)) > 0.4),
    "uncrop": Uncrop(right=2),
    "gray": Grayscale(),
    "pool of gray": AveragePool(2) @ Grayscale(),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_posteriors_obey_the_rule_of_bayes(name, operator):
    """The log-density of the posterior is that of the prior plus the log-likelihood, up to a constant."""
    world, operator, sigma = WORLDS[name], OPERATORS[operator], 0.4
    truth = world.sample(3, 1, torch.float64)
    y = operator.measure(truth)
    y = y + sigma * normal(*y.shape)
    x = truth[:1] + normal(6, *SHAPE, number=2)
    misfit = operator.measure(operator.pseudo_inverse(y[1:2])) - operator.measure(x)
    expected = world.log_density(x) - misfit.square().flatten(1).sum(1) / (2 * sigma**2)
    posterior = world.posterior(Observation(operator, y, sigma), 1)
    difference = posterior.log_density(x) - expected
    torch.testing.assert_close(difference, difference.mean().expand(6), rtol=1e-8, atol=1e-8)
    assert posterior.sample_shape == SHAPE and isinstance(posterior, type(world))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_the_evidence_is_the_quotient_of_prior_times_likelihood_and_posterior(name, operator):
    world, operator, sigma = WORLDS[name], OPERATORS[operator], 0.4
    y = operator.measure(world.sample(3, 1, torch.float64))
    observation = Observation(operator, y, sigma)
    x = world.sample(4, 2, torch.float64)
    residual = observation.residual(operator.measure(x[:1]))[1:2]
    terms = residual.square() / sigma**2 + math.log(2 * math.pi * sigma**2)
    likelihood = -observation.observed(terms).sum() / 2
    expected = world.log_density(x[:1]) + likelihood - world.posterior(observation, 1).log_density(x[:1])
    assert world.log_evidence(observation, 1) == pytest.approx(float(expected), abs=1e-8)


def test_the_evidence_with_a_noise_level_for_each_value_and_with_a_covariance():
    world = GaussianMixture([0.7, 0.3], [[0.0, 0.0], [1.0, -1.0]], [[1.0, 0.3], [0.3, 0.5]])
    y, everything = torch.tensor([[0.4, -0.9]]), Mask(torch.tensor([True]))
    noise = torch.tensor([[0.3, 0.6]], dtype=torch.float64)
    expected = math.log(
        sum(
            weight * torch.distributions.MultivariateNormal(mean, world._within + noise[0].square().diag())
            .log_prob(y[0].double()).exp()
            for weight, mean in zip(world.weights, world.means, strict=True)
        )
    )  # fmt: skip
    for sigma in (noise, lambda r: r / noise**2):
        assert world.log_evidence(Observation(everything, y.double(), sigma)) == pytest.approx(expected)
    p = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    first = Observation(Mask(torch.tensor([True, False])), y.double(), lambda r: r @ p)
    same = Observation(first.operator, first.y, 0.5**0.5)
    assert world.log_evidence(first) == pytest.approx(world.log_evidence(same))
    torch.testing.assert_close(world.posterior(first).means, world.posterior(same).means)
    many = Observation(first.operator, first.y.expand(4000, 2), first.sigma)
    assert float(noise_of(many, seed())[:, 0].var()) == pytest.approx(0.5, rel=0.1)
    one = torch.tensor([[0.3, math.inf]], dtype=torch.float64)
    single = GaussianMixture([0.7, 0.3], [[0.0], [1.0]], 1.0)
    expected = single.log_evidence(Observation(everything, y[:, :1].double(), 0.3))
    assert world.log_evidence(Observation(everything, y.double(), one)) == pytest.approx(expected)
    assert world.log_evidence(Observation(Mask(torch.tensor([False])), y)) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"y has no density, since its values determine each other\. Pass sigma above"):
        Gaussian([0.0], 1.0).log_evidence(Observation(Matrix(torch.ones(2, 1)), torch.ones(1, 2)))


BLUR, LEFT, TOP = GaussianBlur(0.3), torch.arange(4) < 2, torch.arange(4)[:, None] < 3
LINES = (torch.arange(4) % 2 == 0).expand(4, 4)
WITH_THEIR_MASKS = {  # the same measurement, written with the mask of what is observed
    "lines": (FourierLines(2), Fourier(LINES)),
    "lines of a gray image": (FourierLines(2) @ Grayscale(), Fourier(LINES) @ Grayscale()),
    "mask of lines": (Mask(TOP) @ FourierLines(2), Fourier(TOP & LINES)),
    "mask of a mask of a blur": (Mask(LEFT) @ (Mask(TOP) @ BLUR), Mask(LEFT & TOP) @ BLUR),
}


@pytest.mark.parametrize("name", WITH_THEIR_MASKS)
def test_values_that_the_inner_operator_does_not_observe_are_ignored(name):
    operator, same = WITH_THEIR_MASKS[name]
    world = mixture()
    y, sigma = same.measure(world.sample(1, 1, torch.float64)) + 0.3, 0.5
    known = Observation(same, y, sigma)
    observation = Observation(operator, torch.where(known.mask, y, math.nan), sigma)
    assert torch.equal(observation.mask.expand_as(y), known.mask.expand_as(y))
    assert world.log_evidence(observation) == pytest.approx(world.log_evidence(known))
    torch.testing.assert_close(world.posterior(observation).means, world.posterior(known).means)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_posteriors_of_an_observation_without_noise_agree_with_it(name, operator):
    world, operator = WORLDS[name], OPERATORS[operator]
    y = operator.measure(world.sample(1, 1, torch.float64))
    x = world.posterior(Observation(operator, y)).sample(50, 2, torch.float64)
    torch.testing.assert_close(operator.measure(x), y.expand(50, -1, -1, -1), rtol=0, atol=1e-6)
    assert x.std(0).max() > 0.1


def test_the_weights_of_a_posterior_are_those_of_the_likely_components():
    world = GaussianMixture([0.5, 0.5], [[-1.0] * 4, [1.0] * 4], 0.1, (1, 2, 2))
    half = Mask(torch.tensor([True, False]))
    y = half.measure(torch.full((1, 1, 2, 2), 1.0))
    posterior = world.posterior(Observation(half, y, 0.5))
    # Two values of variance 0.1 + 0.25 are observed, at distances 0 and 2 from the means.
    odds = math.exp(-2 * 2**2 / (2 * 0.35))
    torch.testing.assert_close(posterior.weights, torch.tensor([odds, 1.0], dtype=torch.float64) / (1 + odds))
    far = world.posterior(Observation(half, 100 * y, 0.5))
    assert torch.isfinite(far.sample(5, 0)).all() and far.weights[1] == 1


@pytest.mark.parametrize("sigma", [1e-8, 1e-7, 1e-6, 1e-3, 0.5])
def test_the_weights_of_a_posterior_with_little_noise(sigma):
    """Both components vary along one line, on which y lies; across it there is only the noise."""
    line = torch.nn.functional.normalize(normal(10).double(), dim=0)
    world = GaussianMixture([0.5, 0.5], torch.stack([line, -1.5 * line]), torch.outer(line, line))
    everything = Mask(torch.ones(10, dtype=torch.bool))
    posterior = world.posterior(Observation(everything, 0.1 * line[None], sigma))
    logits = -torch.tensor([0.9, 1.6], dtype=torch.float64).square() / (2 * (1 + sigma**2))
    torch.testing.assert_close(posterior.weights, logits.softmax(0), rtol=1e-9, atol=0)
    if sigma < 1e-2:
        torch.testing.assert_close(posterior.mean, 0.1 * line, rtol=0, atol=2 * sigma**2 + 1e-12)


@pytest.mark.parametrize("covariance", [0.0, [[0.0, 0.0], [0.0, 1.0]]])
def test_components_that_contradict_an_observation_without_noise_have_no_weight(covariance):
    world = GaussianMixture([4, 1, 3], [[0.1, 0.2], [0.7, 0.2], [0.7, 0.9]], covariance)
    seen = Mask(torch.tensor([True, False]))
    posterior = world.posterior(Observation(seen, torch.tensor([[0.7, 0.0]])))
    torch.testing.assert_close(posterior.weights, torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))
    noisy = world.posterior(Observation(seen, torch.tensor([[0.7, 0.0]]), 0.01))
    torch.testing.assert_close(noisy.weights, posterior.weights)


def test_components_that_contradict_an_observation_equally_keep_their_weights():
    """Both components vary along one line; y lies beside it, and its part along the line decides."""
    line, away = torch.linalg.qr(normal(10, 2).double()).Q.T
    world = GaussianMixture([0.5, 0.5], torch.stack([line, -1.5 * line]), torch.outer(line, line))
    y = (0.1 * line + 3 * away)[None]
    posterior = world.posterior(Observation(Mask(torch.ones(10, dtype=torch.bool)), y))
    logits = -torch.tensor([0.9, 1.6], dtype=torch.float64).square() / 2
    torch.testing.assert_close(posterior.weights, logits.softmax(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(posterior.mean, 0.1 * line, rtol=0, atol=1e-9)


def test_a_posterior_is_sampled_like_its_prior():
    half, options = Mask(torch.arange(4) < 2), {"schedule": LEVELS, "value_range": (0, 1)}
    mixture = GaussianMixture([1.0], [[0.5] * 48], 0.1, SHAPE, **options)
    for world in (Gaussian([0.5] * 48, 0.1, SHAPE, **options), mixture):
        posterior = world.posterior(Observation(half, half.measure(world.sample(1, 0)), 0.1))
        assert (posterior.sample_shape, posterior.schedule, posterior.value_range) == (SHAPE, LEVELS, (0, 1))
        x = run(AnnealedLangevinSampler(posterior), 2, generator=0)
        assert x.shape == (2, *SHAPE) and x.min() >= 0 and x.max() <= 1


def test_values_that_a_mask_hides_have_no_influence():
    world, left = WORLDS["mixture"], Mask(torch.arange(4) < 2)
    y = left.measure(world.sample(1, 0))
    hidden = torch.where(left.mask, y, math.nan)
    a, b = (world.posterior(Observation(left, each, 0.1)) for each in (y, hidden))
    assert torch.equal(a.means, b.means) and torch.equal(a.weights, b.weights)


def test_each_image_of_an_observation_may_have_its_own_mask():
    world, masks = WORLDS["gaussian"], Mask(torch.rand(3, 1, 4, 4, generator=seed(1)) > 0.5)
    x = world.sample(3, 0)
    observation = Observation(masks, masks.measure(x), 0.1)
    alone = Observation(Mask(masks.mask[2]), observation.y[2:], 0.1)
    torch.testing.assert_close(world.posterior(observation, 2).mean, world.posterior(alone).mean)


# -- As scores of samplers


def test_samplers_use_the_schedule_and_the_shape_of_a_distribution():
    world = Gaussian(torch.zeros(48), 1.0, SHAPE, schedule=LEVELS)
    sampler = AnnealedLangevinSampler(world, levels=5)
    assert len(sampler.schedule) == 5 and run(sampler, 2).shape == (2, *SHAPE)
    clamped = Gaussian(torch.full((48,), 0.5), 1.0, SHAPE, schedule=LEVELS, value_range=(0, 1))
    x = run(AnnealedLangevinSampler(clamped), 2, generator=0)
    assert (x.min(), x.max()) == (0, 1)


def test_sampling_with_the_score_of_a_data_set_returns_its_images():
    data = torch.rand(5, *SHAPE, generator=seed())
    x = run(ODESampler(Empirical(data, schedule=NoiseSchedule.geometric(5, 0.01, 10))), 20, generator=0)
    nearest = torch.cdist(x.flatten(1), data.flatten(1)).min(1)
    assert nearest.values.max() < 1e-3 and len(nearest.indices.unique()) > 1


# -- Bad input


def _seen(n):
    return Observation(Mask(torch.ones(1, dtype=torch.bool)), torch.zeros(n, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Gaussian([0.0, 0.0], 1.0)(torch.zeros(2, 3), 1.0),
            ValueError,
            r"x must be \(N, 2\), got shape \(2, 3",
        ),
        (
            lambda: Gaussian([0.0], 1.0)(torch.ones(2, 1).long(), 1.0),
            TypeError,
            "x must be floating point.*torch.int64",
        ),
        (lambda: Gaussian([0.0], 1.0).log_density(normal(2, 1).numpy()), TypeError, "x must be a tensor.*got ndarray"),
        (lambda: Gaussian([0.0], 1.0)(torch.zeros(2, 1), 0.0), ValueError, "sigma must be positive, got 0"),
        (
            lambda: Gaussian([0.0, 0.0], [[1.0]]),
            ValueError,
            r"covariance must be \(2, 2\) or a number, got shape \(1, 1",
        ),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), ValueError, "covariance must be symmetric"),
        (lambda: Gaussian([0.0, 0.0], [[1.0, 2.0], [2.0, 1.0]]), ValueError, "no negative eigenvalues, got .* -1 to 3"),
        (lambda: Gaussian([0.0], math.nan), ValueError, "covariance must be symmetric and finite"),
        (lambda: Gaussian([0.0, 0.0], 1.0, (3,)), ValueError, r"sample_shape must have 2 values.*got \(3,\)"),
        (lambda: GaussianMixture([1.0], [0.0], 1.0), ValueError, r"means must be \(K, D\), got shape \(1,\)"),
        (lambda: GaussianMixture([1.0], [[0.0], [1.0]], 1.0), ValueError, "weights must be 2 positive numbers"),
        (lambda: GaussianMixture([1.0, 0.0], [[0.0], [1.0]], 1.0), ValueError, "weights must be 2 positive numbers"),
        (lambda: Empirical(torch.zeros(2, 3).long()), TypeError, "floating point or uint8, got torch.int64"),
        (lambda: Empirical([[0.0]]), TypeError, "got list"),
        (lambda: Empirical(torch.zeros(3)), ValueError, r"data must be a batch .*got shape \(3,\)"),
        (lambda: Empirical(torch.zeros(2, 3), -1.0), ValueError, "bandwidth must be at least 0, got -1"),
        (lambda: operator_matrix(JPEG(50), SHAPE), ValueError, r"the operator must be linear, got JPEG\(50\)"),
        (
            lambda: Gaussian([0.5] * 48, 1.0, SHAPE).posterior(Observation(AveragePool(2), torch.zeros(1, 3, 1, 1))),
            ValueError,
            r"must be of samples of shape \(3, 4, 4\), but Observation\(.*\) is of samples of shape \(3, 2, 2\)",
        ),
        (
            lambda: Gaussian([0.5] * 48, 1.0, SHAPE).posterior(Observation(Uncrop(right=1), torch.zeros(2, *SHAPE)), 1),
            ValueError,
            r"is of samples of shape \(3, 4, 5\)",
        ),
        (lambda: Empirical(torch.rand(3, 2)).log_density(torch.rand(4, 2)), ValueError, "no density.* a higher sigma"),
        (lambda: Gaussian([0.0, 0.0], 0.0).log_density(torch.rand(4, 2)), ValueError, "no density.* a higher sigma"),
        (lambda: Gaussian([0.0] * 2, torch.ones(2, 2)).log_density(torch.rand(4, 2)), ValueError, "no density"),
        (lambda: Gaussian([0.0], 1.0).log_density(torch.zeros(1, 1), -0.1), ValueError, "must be positive, got -0.1"),
        (lambda: Gaussian([0.5], 1.0).posterior(torch.zeros(1, 1)), TypeError, "must be an Observation, got Tensor"),
        (lambda: Gaussian([0.5], 1.0).posterior(_seen(3), 3), ValueError, "image must be from 0 to 2, got 3"),
        (lambda: Gaussian([0.5], 1.0).posterior(_seen(3), -1), ValueError, "image must be from 0 to 2, got -1"),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()
