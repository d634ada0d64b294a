"""Moment matching against the exact posteriors of Gaussian data."""

import itertools
from functools import partial

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation import posterior_calibration
from scorematch.evaluation.exact import Gaussian, operator_matrix
from scorematch.restoration import AveragePool, Grayscale, Linear, Mask, Matrix, Observation, Operator, Uncrop
from scorematch.restoration.moments import MomentMatching, image_of
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler
from tests.helpers import gaussian_images, run, seed
from tests.networks import images, network

SHAPE = (3, 4, 4)
WORLD = gaussian_images(SHAPE)
ROWS = slice(0, 3)
LEVELS = NoiseSchedule.geometric(20, 0.01, 20)


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number))


OPERATORS = {
    "mask": Mask(random(4, 4) > 0),
    "uncrop": Uncrop(right=2),
    "gray": Grayscale(),
    "pool": AveragePool(2),
    "function": Linear(lambda x: (x * torch.arange(1, 5, dtype=x.dtype)).cumsum(-1)),
    "matrix": Matrix(random(5, 48)),
    "composed": Grayscale() @ AveragePool(2),
}


def noises(y):
    """A noise level, one for each value of y, some of which are not measured, and a covariance."""
    levels = 0.05 + torch.rand(y.shape[1:], generator=seed(1))
    half = random(y[0].numel(), y[0].numel(), number=2)
    inverse = torch.linalg.inv(half @ half.T / len(half) + 0.1 * torch.eye(len(half)))
    missing = torch.where(torch.rand(y.shape[1:], generator=seed(3)) < 0.3, torch.inf, levels)
    return {
        "number": 0.1,
        "values": levels,
        "missing": missing,
        "covariance": lambda values: (values.flatten(1) @ inverse.to(values)).view_as(values),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shift", "moment-matching", "guide"])
def test_posteriors_in_units_of_a_power_of_two_are_the_same_to_the_bit(name):
    """Also if squares of squares of the values are not in float32."""
    y = random(1, 5)

    def draw(s):
        world = Gaussian(random(48) * s, s**2, SHAPE, schedule=NoiseSchedule.geometric(20 * s, 0.01 * s, 5))
        observation = Observation(OPERATORS["matrix"], s * y, 0.1 * s)
        return run(ODESampler(world, restore=name), 2, observation=observation, generator=0)

    assert torch.equal(draw(2.0**-40) * 2.0**40, draw(1.0)) and torch.equal(draw(2.0**30) / 2.0**30, draw(1.0))


QUICK = {("mask", "number"), ("gray", "missing"), ("pool", "values"), ("matrix", "covariance")}


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(OPERATORS, ["number", "values", "missing", "covariance"])
    ],
)
def test_the_score_is_that_of_the_exact_posterior_of_gaussian_data(name, noise):
    y = OPERATORS[name].measure(WORLD.sample(3, 5))
    observation = Observation(OPERATORS[name], y, noises(y)[noise]).of_shape(SHAPE)
    method = MomentMatching(observation, 1.0, iterations=60, tolerance=1e-5)
    for sigma in (20.0, 0.5):
        x = WORLD.sample(3, 6) + sigma * random(3, *SHAPE, number=7)
        found = sigma**2 * method.score(WORLD, x, sigma, ROWS)
        for i in range(3):
            expected = sigma**2 * WORLD.posterior(observation, i)(x[i : i + 1], sigma)
            assert torch.allclose(found[i : i + 1], expected, atol=2e-3 * float(expected.abs().max()))


def test_the_iterations_end_when_the_residual_is_small_and_not_later():
    observation = Observation(Mask(random(4, 4) > 0), WORLD.sample(3, 1), 0.1)
    calls, counts = [], []

    def score(x, sigma):
        return Counted.apply(WORLD(x, sigma), calls)

    for tolerance in (0.5, 1e-2, 1e-4):
        calls.clear()
        MomentMatching(observation, 1.0, iterations=60, tolerance=tolerance).score(score, random(3, *SHAPE), 1.0, ROWS)
        counts.append(len(calls))
    assert 0 < counts[0] < counts[1] < counts[2] < 40


class Counted(torch.autograd.Function):
    """The identity, which records its backward passes."""

    @staticmethod
    def forward(ctx, x, calls):
        ctx.calls = calls
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.calls.append(1)
        return gradient, None


@pytest.mark.parametrize(
    "name", [name if name in ("mask", "composed") else pytest.param(name, marks=pytest.mark.slow) for name in OPERATORS]
)
def test_without_noise_the_result_meets_the_measurement(name):
    operator = OPERATORS[name]
    y = operator.measure(WORLD.sample(2, 1))
    sampler = ODESampler(WORLD, LEVELS, levels=6, clamp=False, restore="moment-matching")
    x = run(sampler, observation=Observation(operator, y), generator=0)
    assert torch.allclose(operator.measure(x), y, atol=1e-4)
    part = torch.where(torch.arange(y[0].numel()).view(y.shape[1:]) % 2 == 0, 0.0, 0.2)
    x = run(sampler, observation=Observation(operator, y, part), generator=0)
    assert torch.allclose(operator.measure(x)[:, part == 0], y[:, part == 0], atol=1e-4)
    assert not torch.allclose(operator.measure(x)[:, part > 0], y[:, part > 0], atol=1e-4)


SAMPLERS = {
    "langevin": partial(AnnealedLangevinSampler, consistent=False, steps_per_level=2),
    "consistent": partial(AnnealedLangevinSampler, consistent=True),
    "heun": ODESampler,
    "dpm-solver++": partial(ODESampler, method="dpm-solver++"),
    "ancestral": AncestralSampler,
    "predictor-corrector": PredictorCorrectorSampler,
}


@pytest.mark.parametrize(
    "name", [name if name == "heun" else pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS]
)
def test_a_sample_does_not_depend_on_its_batch_and_repeats_with_its_seed(name):
    sampler = SAMPLERS[name](WORLD, LEVELS, levels=5, clamp=False, restore="moment-matching")
    operator = OPERATORS["pool"]
    observation = Observation(operator, operator.measure(WORLD.sample(3, 1)), 0.1)
    x = run(sampler, observation=observation, generator=[4, 5, 6])
    assert torch.equal(x, run(sampler, observation=observation, generator=[4, 5, 6]))
    assert torch.equal(x, run(sampler, observation=observation, generator=[4, 5, 6], batch_size=3))
    for i in range(3):
        alone = run(sampler, observation=observation.rows(slice(i, i + 1)), generator=[4 + i])
        assert torch.allclose(x[i : i + 1], alone, atol=1e-4)
    assert torch.allclose(x, run(sampler, observation=observation, generator=[4, 5, 6], batch_size=2), atol=1e-4)


@pytest.mark.slow
def test_a_matrix_equals_the_operator_whose_matrix_it_is():
    for name in ("mask", "gray", "function"):
        operator = OPERATORS[name]
        y, x = operator.measure(WORLD.sample(3, 1)), random(3, *SHAPE)
        observations = [
            Observation(operator, y, 0.1).of_shape(SHAPE),
            Observation(Matrix(operator_matrix(operator, SHAPE)), y.flatten(1), 0.1).of_shape(SHAPE),
        ]
        first, second = (
            MomentMatching(each, 1.0, iterations=60, tolerance=1e-5).score(WORLD, x, 1.0, ROWS) for each in observations
        )
        assert torch.allclose(first, second, atol=1e-3)


class Cubes(Operator):
    """The cubes of every second value: neither linear nor of the shape of the sample."""

    def measure(self, x):
        return x[..., ::2] ** 3


@pytest.mark.slow
def test_a_nonlinear_operator_is_met_within_its_noise():
    y = Cubes().measure(WORLD.sample(50, 1))
    sampler = ODESampler(WORLD, LEVELS, levels=10, clamp=False, restore="moment-matching")
    x = run(sampler, shape=SHAPE, observation=Observation(Cubes(), y, 0.05), generator=0)
    prior = run(sampler, 50, shape=SHAPE, generator=0)
    assert (Cubes().measure(x) - y).square().mean() < 0.1 * (Cubes().measure(prior) - y).square().mean()


@pytest.mark.slow
def test_a_start_that_is_drawn_is_around_the_posterior():
    far = Gaussian([5.0, -5.0], [[1.0, 0.5], [0.5, 1.0]], schedule=NoiseSchedule.geometric(4, 0.1, 5))
    observation = Observation(Mask(torch.tensor([True, False])), torch.tensor([[6.0, 0.0]]), 0.5)
    sampler = _Starts(far, restore="moment-matching")
    run(sampler, 100_000, observation=observation, generator=0)
    exact = far.posterior(observation)
    share = exact.values / (exact.values + 4**2)  # the response of the denoised image along each axis
    along = (sampler.first.double() - exact.mean) @ exact.vectors
    assert torch.allclose(along.mean(0), -share * (exact.mean @ exact.vectors), atol=0.05)
    assert torch.allclose(along.var(0), 4**2 * (1 + share + share**2), rtol=0.02)
    init = torch.ones(3, 2)
    run(sampler, init=init, observation=observation)
    assert torch.equal(sampler.first, init)


class _Starts(ODESampler):
    """Keeps the state with which the steps begin."""

    def steps(self, x, chain):
        self.first = x
        return super().steps(x, chain)


def test_a_measurement_with_infinite_noise_leaves_the_score_of_the_prior():
    x, y = random(3, *SHAPE), torch.ones(3, *SHAPE)
    for sigma in (1e8, torch.full(SHAPE, torch.inf)):
        method = MomentMatching(Observation(Linear(torch.clone), y, sigma).of_shape(SHAPE), 1.0)
        assert torch.allclose(method.score(WORLD, x, 0.5, ROWS), WORLD(x, 0.5), atol=1e-6)


@pytest.mark.slow
def test_a_network_in_bfloat16_restores_like_one_in_float32(rng):
    exact, rounded = network("unet"), network("unet").bfloat16()
    x = images(2, rng)
    observation = Observation(Mask(torch.rand(x.shape[2:], generator=rng) < 0.5), x, 0.1)
    options = {"levels": 6, "restore": "moment-matching", "precision": "float32"}
    found, expected = (
        run(ODESampler(each, **options), observation=observation, generator=0) for each in (rounded, exact)
    )
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found - expected).norm() < 0.05 * expected.norm()


def test_draws_are_calibrated():
    sampler = ODESampler(WORLD, LEVELS, levels=20, method="dpm-solver++", clamp=False, restore="moment-matching")
    options = {"sigma": 0.1, "observations": 60, "draws": 10, "progress": False}
    _, found = posterior_calibration(WORLD, Uncrop(right=2), {"moment-matching": sampler}, **options)
    assert abs(found.spread.value - 1) < 0.03 + 3 * found.spread.error
    assert found.shift < 0.1


def test_the_image_of_a_measurement_that_is_no_image_is_the_least_squares():
    x, a = random(2, 3, 4, 4).float(), random(60, 48, number=1).float()
    for inner in (Mask(random(4, 4) > 0), Grayscale()):
        operator = Matrix(a[:, : inner.measure(x)[0].numel()]) @ inner
        found = image_of(operator, operator.measure(x), (3, 4, 4))
        assert torch.allclose(found, inner.pseudo_inverse(inner.measure(x)), atol=1e-3)
