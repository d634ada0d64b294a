"""Twisted sequential Monte Carlo, compared with posteriors and evidences that are known."""

import itertools
import math

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.evaluation.calibration import posterior_calibration
from scorematch.evaluation.exact import Gaussian, GaussianMixture, operator_matrix
from scorematch.restoration import AveragePool, Fourier, GaussianBlur, Grayscale, Linear, Mask, Matrix, Observation
from scorematch.restoration.method import Restoration
from scorematch.restoration.methods import METHODS
from scorematch.restoration.twist import Twist
from scorematch.sampling import AncestralSampler, AnnealedLangevinSampler, ParticleSampler
from tests.helpers import run, seed

FEW = NoiseSchedule.geometric(5, 0.1, 12)
MANY = NoiseSchedule.geometric(10, 0.02, 40)
FIRST = Mask(torch.tensor([True, False, False]))
MIXING = Matrix(torch.tensor([[1.0, 0.5, 0.0], [0.3, -0.4, 0.8]]))
# The second coordinate is measured, and says little about the component; the first one differs between them.
TWO = GaussianMixture([0.8, 0.2], [[-1.5, -1.0], [1.5, 1.0]], 0.1, schedule=MANY)
BETWEEN = Observation(Mask(torch.tensor([False, True])), torch.tensor([[0.0, 0.3]]), sigma=0.7)


def _population(sampler, observation, n, generator=0, **options):
    return sampler.population(observation, n, generator=generator, progress=False, **options)


def _drawn(world, schedule, denoise=True):
    """The distribution that the sampler draws without an observation from a Gaussian, whose score is linear."""
    values, v = world.values + 0, world.data_std**2
    variance = torch.full_like(values, schedule.sigma_max**2)
    mean = torch.zeros_like(values)
    center = world.mean @ world.vectors
    for a, b in itertools.pairwise(level**2 for level in schedule):
        slope = 1 - (a - b) / (values + a)
        noise = (a - b) * b / a + (1 - b / a) ** 2 * a * v / (a + v)
        mean, variance = slope * mean + (1 - slope) * center, slope**2 * variance + noise
    if denoise:
        slope = values / (values + schedule.sigma_min**2)
        mean, variance = slope * mean + (1 - slope) * center, slope**2 * variance
    return Gaussian(world.vectors @ mean, world.vectors * variance @ world.vectors.T)


# -- The evidence


@pytest.mark.parametrize("restore", METHODS)
@pytest.mark.parametrize(
    ("operator", "denoise"),
    [*(pytest.param(FIRST, denoise, marks=pytest.mark.slow) for denoise in (True, False)), (MIXING, True)],
    ids=["mask", "no denoising", "matrix"],
)
def test_the_evidence_is_unbiased_for_the_distribution_that_the_sampler_draws(world, restore, operator, denoise):
    """With few levels and few particles, and five standard errors, which are below two percent."""
    y = operator.measure(torch.tensor([[0.9, -0.2, 0.4]]))
    observation = Observation(operator, y, sigma=0.4)
    sampler = ParticleSampler(world, FEW, particles=6, restore=restore, denoise=denoise)
    found = _population(sampler, observation, 1000)
    ratio = (found.log_evidence.double() - _drawn(world, FEW, denoise).log_evidence(observation)).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 5 * error and error < 0.02


def test_the_evidence_with_a_noise_level_for_each_value(world):
    y = torch.tensor([[0.9, -0.2, math.nan]])
    observation = Observation(Mask(torch.tensor([True])), y, torch.tensor([[0.4, 0.8, math.inf]]))
    found = _population(ParticleSampler(world, FEW, particles=6, restore="moment-matching"), observation, 500)
    ratio = (found.log_evidence.double() - _drawn(world, FEW).log_evidence(observation)).exp()
    error = float(ratio.std()) / len(ratio) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 5 * error and error < 0.02


@pytest.mark.slow
def test_the_evidence_of_a_mixture_and_its_spread_as_the_number_of_particles_grows():
    exact, spreads = TWO.log_evidence(BETWEEN), []
    for particles in (2, 8, 32):
        found = _population(ParticleSampler(TWO, particles=particles), BETWEEN, 2400 // particles)
        spreads.append(float(found.log_evidence.std()))
        ratio = found.log_evidence.exp() / math.exp(exact)
        # The prior of 40 levels has an evidence that is larger by 0.02.
        assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / len(ratio) ** 0.5 + 0.03
    # The standard deviation falls as the root of the number of particles: by 4 from 2 to 32.
    assert all(b < 0.7 * a for a, b in itertools.pairwise(spreads)) and 2.8 < spreads[0] / spreads[-1] < 6, spreads


def test_an_observation_that_says_nothing_gives_equal_weights_and_the_evidence_of_noise():
    y, loud = torch.tensor([[0.3, -0.5]]), 1e4
    found = _population(ParticleSampler(TWO, FEW, particles=5), Observation(Mask(torch.tensor([True])), y, loud), 8)
    torch.testing.assert_close(found.weights, torch.full((8, 5), 0.2), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.effective_size, torch.full((12, 8), 5.0), rtol=1e-4, atol=0)
    noise = -math.log(2 * math.pi * loud**2)
    torch.testing.assert_close(found.log_evidence, torch.full((8,), noise), rtol=0, atol=1e-4)
    nothing = Observation(Mask(torch.zeros(2, dtype=torch.bool)), y)
    found = _population(ParticleSampler(TWO, FEW, particles=5), nothing, 8)
    assert not found.log_evidence.any() and (found.weights == 0.2).all()


# -- The posterior


@pytest.mark.slow
def test_particles_find_the_weights_of_two_modes_that_single_chains_miss():
    """The minor component has the weight 0.41 in the posterior; single chains of the same method find 0.25."""
    share = float(TWO.posterior(BETWEEN).weights[1])
    assert share == pytest.approx(0.409, abs=1e-3)
    chains = run(AnnealedLangevinSampler(TWO, consistent=True, restore="guide"), 1000, observation=BETWEEN, generator=0)
    assert float((chains[:, 0] > 0).float().mean()) < share - 0.1
    distances = []
    for particles in (2, 16, 64):
        found = _population(ParticleSampler(TWO, particles=particles, restore="guide"), BETWEEN, 4800 // particles)
        minor = (found.weights * (found.particles[..., 0] > 0)).sum(1)
        error = float(minor.std()) / len(minor) ** 0.5
        distances.append(share - float(minor.mean()))
        # The bias of the ratio estimate falls as 1 / particles; the prior of 40 levels is off by 0.002.
        assert abs(distances[-1]) < 5 * error + 0.25 / particles, distances
    assert distances[0] > 0.05 and abs(distances[-1]) < 0.02


@pytest.mark.parametrize("restore", ["guide", pytest.param("guide-jacobian", marks=pytest.mark.slow)])
def test_samples_have_the_posterior_of_a_gaussian(world, restore):
    """Mean and covariance with five standard errors, and four percent for the 60 levels."""
    schedule, n = NoiseSchedule.geometric(10, 0.02, 60), 500
    y = MIXING.measure(torch.tensor([[0.9, -0.2, 0.4]]))
    observation = Observation(MIXING, y, sigma=0.3)
    posterior = world.posterior(observation)
    x = run(ParticleSampler(world, schedule, restore=restore), n, observation=observation, generator=1).double()
    along = (x - posterior.mean) @ posterior.vectors / posterior.values.sqrt()
    assert along.mean(0).abs().max() < 5 / n**0.5 + 0.04
    assert (along.T.cov() - torch.eye(3)).abs().max() < 5 * (2 / n) ** 0.5 + 0.04


@pytest.mark.slow
def test_a_nonlinear_operator_with_two_modes():
    """Y = x^2 + noise for a standard normal x; the truth by quadrature."""
    exact = Gaussian([0.0], 1.0, schedule=MANY)
    square = Linear(lambda x: x**2)
    square.linear = False
    sampler = ParticleSampler(exact, particles=64, restore="guide-jacobian")
    found = _population(sampler, Observation(square, torch.tensor([[1.5]]), sigma=0.5), 100)
    x = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    density = (-(x**2) / 2 - (1.5 - x**2) ** 2 / (2 * 0.25)).exp()
    evidence = float(density.sum() * (x[1] - x[0])) / (2 * math.pi * 0.5)
    ratio = found.log_evidence.exp() / evidence
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 10 + 0.02
    for moment in (x, x**2):
        expected = float((density * moment).sum() / density.sum())
        power = 1 if moment is x else 2
        each = (found.weights * found.particles[..., 0] ** power).sum(1)
        assert abs(float(each.mean()) - expected) < 5 * float(each.std()) / 10 + 0.02


@pytest.mark.slow
def test_without_noise_the_observed_values_are_kept_and_the_others_follow_them(world):
    n, y = 600, torch.tensor([[0.9, 0.0, 0.0]])
    observation = Observation(FIRST, y)
    found = _population(ParticleSampler(world, MANY), observation, n)
    assert (found.samples[:, 0] == 0.9).all() and (found.particles[..., 0] == 0.9).all()
    posterior = world.posterior(observation)
    deviation = posterior.covariance.diagonal()[1:].sqrt()
    shift = (found.samples[:, 1:].double().mean(0) - posterior.mean[1:]) / deviation
    assert shift.abs().max() < 5 / n**0.5 + 0.04


@pytest.mark.slow
def test_draws_of_a_mixture_are_calibrated():
    """Coverage of 90 % intervals within two points and two standard errors; single chains are far off."""
    means, axes = torch.randn(4, 16, generator=seed(0)), torch.linalg.qr(torch.randn(16, 16, generator=seed(1)))[0]
    covariance = 0.5 * axes * torch.logspace(0, -2, 16) @ axes.T
    exact = GaussianMixture([0.4, 0.3, 0.2, 0.1], means, covariance, schedule=NoiseSchedule.geometric(10, 0.02, 60))
    samplers = {
        "single": AnnealedLangevinSampler(exact, restore="guide", consistent=True),
        "particles": ParticleSampler(exact, particles=16, restore="guide"),
    }
    _, single, particles = posterior_calibration(
        exact, Mask(torch.arange(16) < 8), samplers, sigma=0.2, observations=100, progress=False
    )
    _, coverage = particles.coverage(1)
    assert abs(coverage.value - 0.9) < 0.02 + 2 * coverage.error
    assert single.spread.value > 1.5 and single.shift > 0.5
    assert particles.spread.value < 1.1 and particles.shift < 0.2


# -- The twisting function


def test_the_twisting_function_of_data_without_correlations_is_the_likelihood(rng):
    """For data N(0, v I), p(y | x) is known at each level; also where y is not measured."""
    v, sigma = 0.5, 0.7
    noise = torch.tensor([[0.3, 1.0, math.inf]])
    observation = Observation(Mask(torch.tensor([True, True, True])), torch.tensor([[0.2, -1.0, math.nan]]), noise)
    x = torch.randn(6, 3, generator=rng)
    shrunk = v / (v + sigma**2)
    denoised = shrunk * x
    twist = Twist(Restoration(), Observation(FIRST, torch.zeros(1, 3)), v, 0.0)  # has an own method
    assert type(twist.method).__name__ == "Guidance"
    twist = Twist(_Own(), observation, v, 0.0)
    spread = (noise[:, :2] ** 2 + sigma**2 * shrunk).sqrt()
    expected = torch.distributions.Normal(denoised[:, :2], spread).log_prob(observation.y[:, :2]).sum(1)
    torch.testing.assert_close(twist.log_likelihood(denoised, sigma), expected)
    expected = torch.distributions.Normal(x[:, :2], noise[:, :2]).log_prob(observation.y[:, :2]).sum(1)
    torch.testing.assert_close(twist.log_likelihood(x, 0.1, end=True), expected)


class _Own(Restoration):
    def score(self, score, x, sigma, rows):
        return score(x, sigma)


OPERATORS = {
    "matrix": Matrix(torch.randn(20, 48, generator=seed(0))),
    "more values than the sample has": Matrix(torch.randn(60, 48, generator=seed(1))),
    "of lower rank": Matrix(torch.randn(20, 8, generator=seed(2)) @ torch.randn(8, 48, generator=seed(3))),
    "blur": GaussianBlur(0.3),
    "blur and mask": AveragePool(2) @ Mask(torch.rand(4, 4, generator=seed(4)) > 0.3),
    "fourier": Fourier(torch.rand(4, 4, generator=seed(8)) > 0.4),
    "gray": Grayscale(),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_twisting_function_has_the_covariance_of_the_measurement(name):
    """N(y; A D, sigma_y^2 I + r^2 A A^T), on the observed values."""
    operator, sigma, noise, v, shape = OPERATORS[name], 0.6, 0.3, 0.5, (3, 4, 4)
    y = operator.measure(torch.randn(1, *shape, generator=seed(5)))
    observation = Observation(operator, y + noise * torch.randn(y.shape, generator=seed(6)), noise).of_shape(shape)
    x = torch.randn(5, *shape, generator=seed(7))
    seen = observation.observed(torch.ones_like(y)).flatten() > 0
    a = operator_matrix(operator, shape)[seen]
    residual = observation.residual(operator.measure(x)).flatten(1)[:, seen].double()
    twist, eye = Twist(_Own(), observation, v, 0.0), torch.eye(len(a))
    for covariance, end in ((a @ a.T * sigma**2 * v / (sigma**2 + v) + noise**2 * eye, False), (noise**2 * eye, True)):
        expected = torch.distributions.MultivariateNormal(torch.zeros(len(a)).double(), covariance.double())
        # At the end the level is the lowest one, and is not seen beside the noise.
        found = twist.log_likelihood(x, 1e-3 if end else sigma, end=end).double()
        torch.testing.assert_close(found, expected.log_prob(residual), rtol=3e-4, atol=1e-3)


def test_with_a_noise_level_for_each_value_the_twisting_function_has_the_diagonal_of_the_covariance():
    operator = Matrix(torch.randn(40, 30, generator=seed(0)))
    observation = Observation(operator, torch.zeros(1, 40), torch.full((1, 40), 0.1)).of_shape((30,))
    exact = operator_matrix(operator, (30,)).square().sum(1).float()
    found = Twist(_Own(), observation, 0.3, 0.5)._spread.squeeze(0)
    assert (found / exact - 1).abs().max() < 5 * (2 / 64) ** 0.5
    assert abs(float((found / exact).mean()) - 1) < 5 * (2 / 64 / 30) ** 0.5


# -- Weights, seeds and batches


def test_the_shapes_of_a_population_and_the_range_of_the_effective_size():
    sharp = Observation(Mask(torch.tensor([True])), torch.tensor([[1.2, 0.9], [-3.0, 2.0]]), sigma=0.05)
    found = _population(ParticleSampler(TWO, particles=7), sharp, 2)
    assert found.samples.shape == (2, 2) and found.particles.shape == (2, 7, 2)
    assert found.weights.shape == (2, 7) and found.log_evidence.shape == (2,)
    assert found.effective_size.shape == (40, 2)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(2))
    assert found.effective_size.min() >= 1 - 1e-5 and found.effective_size.max() <= 7 + 1e-4
    assert found.effective_size.min() < 3  # it was resampled
    assert ((found.samples[:, None] == found.particles).all(-1).sum(1) >= 1).all()


def test_samples_are_drawn_by_their_weights():
    found = _population(ParticleSampler(TWO, FEW, particles=3), BETWEEN, 4000)
    index = (found.samples[:, None] == found.particles).all(-1).float().argmax(1)
    for i in range(3):
        drawn = (index == i).float() - found.weights[:, i]  # ties between copies go to the first
        if i == 0 and float(drawn.mean()) > 0:
            copies = (found.particles[:, :1] == found.particles[:, 1:]).all(-1).any(1).float().mean()
            assert float(drawn.mean()) < float(copies) + 5 * float(drawn.std()) / 4000**0.5
        else:
            assert float(drawn.mean()) < 5 * float(drawn.std()) / 4000**0.5


def test_the_same_seed_gives_the_same_bits_and_sample_the_samples_of_population():
    sampler = ParticleSampler(TWO, FEW, particles=4)
    found, again = (_population(sampler, BETWEEN, 5, generator) for generator in (3, seed(3)))
    for name in ("samples", "particles", "weights", "log_evidence", "effective_size"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert torch.equal(run(sampler, 5, observation=BETWEEN, generator=3), found.samples)
    assert not torch.equal(_population(sampler, BETWEEN, 5, 4).samples, found.samples)


@pytest.mark.parametrize("restore", ["guide", "guide-jacobian"])
def test_draws_of_one_observation_do_not_depend_on_the_others(world, restore):
    masks = Mask(torch.tensor([[True, False, False], [True, True, False], [False, True, True]]))
    y, sampler = torch.randn(3, 3, generator=seed(1)), ParticleSampler(world, FEW, particles=5, restore=restore)
    observation = Observation(masks, y, sigma=0.1)
    together = _population(sampler, observation, None, [0, 1, 2])
    split = _population(sampler, observation, None, [0, 1, 2], batch_size=4)
    torch.testing.assert_close(split.particles, together.particles, rtol=1e-5, atol=1e-5)
    for i in range(3):
        alone = _population(sampler, observation.rows(slice(i, i + 1)), None, [i])
        torch.testing.assert_close(alone.samples[0], together.samples[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone.log_evidence[0], together.log_evidence[i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(alone.effective_size[:, 0], together.effective_size[:, i], rtol=1e-4, atol=1e-4)


def test_each_particle_has_the_class_of_its_group():
    def score(x, sigma, condition):
        return (condition[:, None] - x) / (0.01 + sigma**2)

    observation = Observation(Mask(torch.tensor([True])), torch.tensor([[0.0]]), sigma=10.0)
    sampler = ParticleSampler(score, FEW, particles=4)
    x = run(sampler, observation=observation, condition=torch.tensor([3, 0, 7]), shape=(1,), generator=0)
    assert (x.squeeze(1) - torch.tensor([3.0, 0.0, 7.0])).abs().max() < 0.6


def test_without_an_observation_the_sampler_is_an_ancestral_one_with_one_particle():
    """With unit variance both have the same steps."""
    world = Gaussian([0.5, 0.0, -0.5], torch.eye(3) / 2 + 0.5)
    sampler = ParticleSampler(world, FEW, particles=4)
    assert torch.equal(run(sampler, 3, generator=0), run(AncestralSampler(world, FEW), 3, generator=0))


def test_states_are_one_particle_of_each_group():
    sampler = ParticleSampler(TWO, FEW, particles=4)
    states = list(sampler.iterate(3, observation=BETWEEN, generator=0, progress=False))
    assert [sigma for _, sigma in states] == [*list(FEW)[1:], 0.0] and all(x.shape == (3, 2) for x, _ in states)
    assert torch.equal(states[-1][0], run(sampler, 3, observation=BETWEEN, generator=0))


# -- Bad input


def test_invalid_arguments_raise():
    for particles in (1, 0, 2.5, None):
        with pytest.raises(ValueError, match=rf"particles must be an integer of at least 2 and .*, got {particles}\."):
            ParticleSampler(TWO, particles=particles)
    observation = Observation(Mask(torch.tensor([True])), torch.zeros(1, 2), lambda r: r / 0.1)
    with pytest.raises(ValueError, match="pass sigma as a number or as a tensor, got a function in Observation"):
        Twist(_Own(), observation, 1.0, 0.0)


def test_a_particle_that_is_not_finite_raises():
    def score(x, sigma):
        return torch.where(x > 0, math.nan, -x / (1 + sigma**2)) if sigma < 0.2 else -x / (1 + sigma**2)

    with pytest.raises(RuntimeError, match="NaN or infinite values from level"):
        run(ParticleSampler(score, FEW, particles=20), 1, observation=BETWEEN, generator=0)
