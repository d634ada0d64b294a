"""Restoration against closed forms: for Gaussian data every step is affine, and the posterior is known."""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.evaluation.exact import Gaussian, operator_matrix
from scorematch.guidance import autoguidance
from scorematch.restoration import JPEG, AveragePool, Grayscale, Mask, Observation, Operator, Uncrop
from scorematch.restoration.guide import Guidance
from scorematch.restoration.methods import METHODS
from scorematch.restoration.palette import condition_of
from scorematch.restoration.replacement import Replacement
from scorematch.sampling import AncestralSampler, ODESampler, PredictorCorrectorSampler
from tests.helpers import gaussian_images, run, seed

SHAPE = (3, 4, 4)
LEVELS = NoiseSchedule.geometric(8, 0.02, 15)
FEW = NoiseSchedule.geometric(8, 0.02, 5)  # for laws that hold with any levels


def observe(operator, sigma=0.0, shape=SHAPE, n=1, seed=3):
    generator = torch.Generator().manual_seed(seed)
    y = operator.measure(torch.rand(n, *shape, generator=generator))
    return Observation(operator, y + sigma * operator.measure(torch.randn(n, *shape, generator=generator)), sigma)


def still(x):
    return torch.zeros_like(x)


OPERATORS = {
    "mask": Mask(torch.rand(4, 4, generator=seed(5)) > 0.4),
    "uncrop": Uncrop(right=2),
    "gray": Grayscale(),
    "pool": AveragePool(2),
    "gray of pool": Grayscale() @ AveragePool(2),
    "mask of gray": Mask(torch.rand(4, 4, generator=seed(6)) > 0.4) @ Grayscale(),
}


# -- The distribution of the samples


def precision(world, sigma):
    """The inverse covariance of a Gaussian with noise of level sigma."""
    return world.vectors @ torch.diag(1 / (world.values + sigma**2)) @ world.vectors.T


def law(world, observation, sampler):
    """The mean and covariance of the samples by recursion, since every step is affine in x and z."""
    size = math.prod(world.sample_shape)
    a, gain = operator_matrix(observation.operator, world.sample_shape), observation.operator.gain
    one = torch.eye(size, dtype=torch.float64)
    seen = a.T @ a / gain
    free = one - seen
    y = a.T @ observation.y[0].double().flatten() / gain
    own = observation.sigma / math.sqrt(gain)
    step = sampler.step_size / sampler.schedule.sigma_min**2
    variance = 2 * step - step**2 if sampler.exact_noise else 2 * step
    m, c = torch.zeros(size, dtype=torch.float64), sampler.schedule.sigma_max**2 * one

    def affine(m, c, factor, offset, root):
        return factor @ m + offset, factor @ c @ factor.T + root @ root.T

    if sampler.schedule.sigma_max <= own:
        share = (sampler.schedule.sigma_max / own) ** 2
        m, c = affine(m, c, free + math.sqrt(1 - share) * seen, share * y, 0 * one)
    for sigma in sampler.schedule:
        length, k = step * sigma**2, precision(world, sigma)
        if sigma > own:
            move, root = one - length * free @ k, free
            offset = length * free @ k @ world.mean
        else:
            share = (sigma / own) ** 2
            held = one - share * seen
            move = one - length * held @ k - length / own**2 * seen
            offset = length * (held @ k @ world.mean + y / own**2)
            root = free + math.sqrt(1 - share) * seen
        for _ in range(sampler.steps_per_level):
            if sigma > own:
                m, c = affine(m, c, free, y, math.sqrt(sigma**2 - own**2) * seen)
            m, c = affine(m, c, move, offset, sigma * math.sqrt(variance) * root)
    sigma = sampler.schedule.sigma_min
    shrink = sigma**2 * precision(world, sigma)
    m, c = affine(m, c, one - shrink, shrink @ world.mean, 0 * one)
    return (m, c) if observation.sigma else (free @ m + y, free @ c @ free)


# Every operator with every size of the noise, and both kinds of noise with each; the other half are slow tests.
CASES = list(itertools.product(["mask", "gray", "pool"], [0.0, 0.3, 20.0], [False, True]))
QUICK = [("mask", 0.0, False), ("mask", 20.0, False), ("gray", 0.3, False), ("gray", 20.0, True), ("pool", 0.3, True)]


@pytest.mark.parametrize(
    ("name", "sigma", "exact_noise"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_replacement_gives_the_derived_mean_and_covariance(name, sigma, exact_noise):
    world, n = gaussian_images(SHAPE), 2000
    observation = observe(OPERATORS[name], sigma)
    sampler = AnnealedLangevinSampler(world, LEVELS, steps_per_level=2, exact_noise=exact_noise, restore="replace")
    x = sampler.sample(n, observation=observation, generator=seed(), progress=False).flatten(1).double()
    mean, covariance = law(world, observation, sampler)
    deviations = covariance.diag().clamp(min=0).sqrt()
    assert ((x.mean(0) - mean).abs() <= 5 * deviations / math.sqrt(n) + 1e-6).all()
    # Along the axes of the derived covariance: variances have a relative error of sqrt(2 / n), correlations are zero.
    values, vectors = torch.linalg.eigh(covariance)
    found = torch.cov(((x - mean) @ vectors).T)
    scale = values.clamp(min=0).sqrt() + 1e-6  # observed values vary only by rounding
    assert ((found - torch.diag(values)).abs() <= 6 * math.sqrt(2 / n) * scale[:, None] * scale).all()


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_the_posterior_mean_is_stationary_below_the_noise_of_y(name, sigma):
    """A chain without added noise stays at the posterior mean, and from elsewhere approaches it."""
    world, observation = gaussian_images(SHAPE), observe(OPERATORS[name], sigma)
    level, gain = 0.8 * sigma, observation.operator.gain
    # The posterior of the noisy image x, whose noise is a part of the noise of y.
    noisy = Gaussian(world.mean, world.covariance + level**2 * torch.eye(len(world.mean)), SHAPE)
    own = math.sqrt(sigma**2 - gain * level**2)
    mean = noisy.posterior(Observation(observation.operator, observation.y, own)).mean
    mean = mean.view(1, *SHAPE).float()
    options = {"steps_per_level": 20, "step_size": 0.5 * level**2}
    raw = AnnealedLangevinSampler(world, NoiseSchedule([level]), denoise=False, **options, restore="replace")
    stay = run(raw, init=mean, observation=observation, noise_source=still)
    torch.testing.assert_close(stay, mean, rtol=0, atol=1e-5)
    away = torch.randn(1, *SHAPE, generator=seed())
    assert (run(raw, init=mean + away, observation=observation, noise_source=still) - mean).norm() < 0.9 * away.norm()
    sampler = AnnealedLangevinSampler(world, NoiseSchedule([level]), **options, restore="replace")
    x = run(sampler, init=mean, observation=observation, noise_source=still)
    torch.testing.assert_close(x.flatten().double(), world.posterior(observation).mean, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_a_long_chain_reaches_the_posterior_mean(name, sigma):
    world, observation = gaussian_images(SHAPE), observe(OPERATORS[name], sigma)
    level = NoiseSchedule([0.8 * sigma])
    sampler = AnnealedLangevinSampler(
        world, level, steps_per_level=3000, step_size=0.5 * level.sigma_min**2, restore="replace"
    )
    x = run(sampler, 1, observation=observation, noise_source=still, shape=SHAPE)
    torch.testing.assert_close(x.flatten().double(), world.posterior(observation).mean, rtol=0, atol=1e-4)


def _wasserstein(mean, covariance, other_mean, other_covariance):
    """The 2-Wasserstein distance of two Gaussians."""

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T

    half = root(covariance)
    cross = root(half @ other_covariance @ half)
    square = (mean - other_mean).square().sum() + (covariance + other_covariance - 2 * cross).trace()
    return float(square.clamp(min=0).sqrt())


@pytest.mark.parametrize(
    ("name", "sigma"),
    [
        *(("mask", 0.0), ("mask", 0.1), ("pool", 0.05)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("uncrop", 0.1), ("gray", 0.05))),
    ],
)
def test_the_distribution_of_replacement_is_close_to_the_posterior(name, sigma):
    """With about 1,000 network calls the 2-Wasserstein distance to the posterior is below an eighth of the prior's."""
    world, observation = gaussian_images(SHAPE), observe(OPERATORS[name], sigma)
    schedule = NoiseSchedule.geometric(8, 0.01, 200)
    sampler = AnnealedLangevinSampler(
        world, schedule, steps_per_level=5, step_size=0.4 * 0.01**2, exact_noise=True, restore="replace"
    )
    known = world.posterior(observation)
    posterior = known.mean, known.covariance
    before = _wasserstein(world.mean, world.covariance, *posterior)
    after = _wasserstein(*law(world, observation, sampler), *posterior)
    assert after < before / 8
    # The distance is smaller than that of replacement that ignores the noise of y.
    if sigma:
        clean = Observation(observation.operator, observation.y)
        assert after < 0.8 * _wasserstein(*law(world, clean, sampler), *posterior)


@pytest.mark.parametrize("jacobian", [False, True])
@pytest.mark.parametrize("sigma_y", [0.0, 0.2])
@pytest.mark.parametrize("name", OPERATORS)
def test_guidance_equals_the_exact_conditional_score_of_white_data(name, sigma_y, jacobian):
    """For data N(m, v I), for which the posterior of x0 given x has the covariance r^2 I."""
    world, observation = gaussian_images(SHAPE, variance=0.7), observe(OPERATORS[name], sigma_y)
    a = operator_matrix(observation.operator, SHAPE)
    y = observation.y.double().flatten()
    guided = Guidance(Observation(observation.operator, observation.y.double(), sigma_y), 0.7, jacobian=jacobian)
    x = torch.randn(2, *SHAPE, generator=seed(), dtype=torch.float64)
    for sigma in (5.0, 0.7, 0.05):
        score = guided.score(world, x, torch.tensor(sigma, dtype=torch.float64), slice(0, 2))
        # x = x0 + sigma e and y = A x0 + sigma_y n are jointly Gaussian; expected is the gradient of log p(x, y) in x.
        size = len(world.mean)
        top = torch.cat([(0.7 + sigma**2) * torch.eye(size, dtype=torch.float64), 0.7 * a.T], 1)
        bottom = torch.cat([0.7 * a, 0.7 * a @ a.T + sigma_y**2 * torch.eye(len(a), dtype=torch.float64)], 1)
        joint = torch.linalg.pinv(torch.cat([top, bottom]), rtol=1e-12, hermitian=True)
        difference = torch.cat([x.flatten(1) - world.mean, (y - a @ world.mean).expand(2, -1)], 1)
        torch.testing.assert_close(score.flatten(1), -(difference @ joint)[:, :size], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma_y", [0.0, 0.2])
def test_guide_jacobian_moves_strong_directions_at_most_twice_as_far_as_the_exact_score(sigma_y):
    """The observed direction has the variance 50 v, as the brightness of a large image has; ΠGDM moves it 50 times."""
    values, sigma = torch.tensor([50.0, 1.0], dtype=torch.float64), 30.0
    seen = Observation(Mask(torch.tensor([True, False])), torch.tensor([[3.0, 0.0]]).double(), sigma_y)
    x = torch.tensor([[5.0, -20.0]], dtype=torch.float64)
    free = -x / (values + sigma**2)
    found = Guidance(seen, 1.0, jacobian=True).score(lambda x, s: -x / (values + s**2), x, sigma, slice(0, 1))
    # The posterior of x0 given x has the variance c; that of y given x has c + sigma_y^2.
    c = sigma**2 * values[0] / (values[0] + sigma**2)
    denoised = x[0, 0] * c / sigma**2
    exact = c / sigma**2 * (3.0 - denoised) / (c + sigma_y**2)
    ratio = (found - free)[0, 0] / exact
    torch.testing.assert_close(ratio, (c + sigma_y**2) / (c / 2 + sigma_y**2))
    assert found[0, 1] == free[0, 1]


@pytest.mark.slow
def test_guide_jacobian_does_not_diverge_for_data_with_one_strong_direction():
    """Images that are gray, with little noise: the missing half becomes the shade of the half that is seen."""
    shape = (3, 16, 16)
    size = math.prod(shape)
    one = torch.ones(size, dtype=torch.float64)
    world = Gaussian(one / 2, 0.1 * torch.outer(one, one) + 1e-4 * torch.eye(size, dtype=torch.float64), shape)
    shades = torch.tensor([0.2, 0.9]).view(2, 1, 1, 1).expand(2, *shape)
    seen = Uncrop(right=8)
    for sampler in (AnnealedLangevinSampler, ODESampler):
        chain = sampler(world, NoiseSchedule.geometric(40, 0.01, 18), restore="guide-jacobian")
        x = run(chain, 2, observation=Observation(seen, seen.measure(shades)), generator=0)
        assert (x - shades).abs().max() < 0.1


@pytest.mark.parametrize("sigma", [40.0, 1.0])
def test_guide_jacobian_limits_the_change_for_a_jacobian_that_is_not_symmetric(sigma):
    """The variance along the error e is zero for an antisymmetric Jacobian: it would not limit the change."""
    turn = torch.tensor([[0.0, -0.9], [0.9, 0.0]], dtype=torch.float64)
    x, y = torch.tensor([[[3.0, -20.0], [1.0, 0.5]], [[5.0, 2.0]] * 2], dtype=torch.float64)
    seen = Observation(Mask(torch.tensor([True, True])), y)
    net = Guidance(seen, 1.0, jacobian=True)
    found = net.score(lambda x, s: (x @ turn.T - x) / s**2, x, sigma, slice(0, 2))
    denoised = x @ turn.T
    change = x + sigma**2 * found - denoised
    error = y - denoised
    expected = min(4, 0.9 * (sigma**2 + 1)) * error.norm(dim=1)
    torch.testing.assert_close(change.norm(dim=1), expected)


@pytest.mark.parametrize("value_range", [None, (-1, 3)])
@pytest.mark.parametrize("restore", ["guide", "guide-jacobian"])
def test_a_guided_chain_equals_the_chain_of_the_posterior_of_white_data(restore, value_range):
    """Data are assumed to have the variance 1, or the square of a quarter of their range."""
    world, observation = gaussian_images(SHAPE, variance=1.0), observe(OPERATORS["mask"], 0.5)
    world.value_range = value_range
    options = {"steps_per_level": 2, "exact_noise": True}
    x = run(AnnealedLangevinSampler(world, LEVELS, restore=restore, **options), 5, observation=observation, generator=0)
    expected = run(
        AnnealedLangevinSampler(world.posterior(observation), LEVELS, **options, restore="replace"), 5, generator=0
    )
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("restore", ["guide", "guide-jacobian"])
def test_guided_chains_reach_the_posterior_of_white_data(restore):
    world, observation, n = gaussian_images(SHAPE, variance=1.0), observe(OPERATORS["mask"], 0.5), 3000
    schedule, options = NoiseSchedule.geometric(10, 0.02, 200), {"steps_per_level": 4, "step_size": 4e-5}
    sampler = AnnealedLangevinSampler(world, schedule, restore=restore, exact_noise=True, **options)
    x = run(sampler, n, observation=observation, generator=seed()).flatten(1).double()
    posterior = world.posterior(observation)
    variance = posterior.covariance.diag()
    assert ((x.mean(0) - posterior.mean).abs() < 5 * variance.sqrt() / math.sqrt(n) + 0.02).all()
    assert ((x.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n) + 0.05).all()


def digit_sampler(**arguments):
    """Consistent sampling with 12 network calls, which are enough for digits."""
    return AnnealedLangevinSampler(ScoreNet.from_pretrained("mnist"), levels=12, **arguments)


@pytest.fixture(scope="module")
def digits():
    return digit_sampler().sample(2, generator=seed(), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "low", "high"), [(0.2, 0.17, 0.23), (0.0, 0.0, 0.0)])
def test_the_noise_of_y_is_not_copied_into_the_result(digits, sigma, low, high):
    """The residual has the size of the noise of y; with sigma = 0 it is exactly zero."""
    left = Mask(torch.arange(28) < 14)
    noisy = digits + 0.2 * torch.randn(digits.shape, generator=seed(1))
    observation = Observation(left, left.measure(noisy), sigma)
    x = digit_sampler(clamp=False).sample(observation=observation, generator=seed(2), progress=False)
    assert low <= float((x - noisy)[..., :14].square().mean().sqrt()) <= high


@pytest.mark.slow
def test_palette_celeba_colors_and_completes_faces():
    """Colors appear and agree with the luma; the visible half of a face is kept, and the other half fits to it."""
    faces = ODESampler(ScoreNet.from_pretrained("celeba-small"), levels=10, restore="replace").sample(
        4, generator=0, progress=False
    )
    sampler = AncestralSampler(
        ScoreNet.from_pretrained("palette-celeba"), levels=12, variance="small", restore="replace"
    )
    luma = Grayscale().measure(faces)
    gray = luma.expand(-1, 3, -1, -1)
    colored = sampler.sample(4, condition=gray, generator=1, progress=False)
    saturation = (colored.amax(1) - colored.amin(1)).mean()
    assert saturation > 0.05 and (Grayscale().measure(colored) - luma).square().mean().sqrt() < luma.std() / 2
    half = Uncrop(right=32)
    seen = Observation(half, half.measure(faces))
    whole = sampler.sample(4, condition=condition_of(half, seen.y, 2), observation=seen, generator=3, progress=False)
    assert torch.equal(whole[..., :32], faces[..., :32])
    # A result that ignores the visible half is as far from the original as another face.
    other = (faces.roll(1, 0) - faces)[..., 32:].square().mean().sqrt()
    assert (whole - faces)[..., 32:].square().mean().sqrt() < 0.8 * other


@pytest.mark.slow
def test_palette_mnist_colors_digits_in_its_three_colors(digits):
    tints = torch.tensor([[1, 0.172, 0], [0, 0.681, 0], [0, 0.487, 1]])  # each of luma 0.4
    gray = (0.4 * digits[:1]).expand(5, -1, -1, -1)
    sampler = AnnealedLangevinSampler(ScoreNet.from_pretrained("palette-mnist"), levels=10)
    x = sampler.sample(condition=condition_of(Grayscale(), gray), generator=seed(), progress=False)
    luma = Grayscale().measure(x)
    assert float((luma - gray).square().mean()) < float(gray.square().mean()) / 4
    distance, nearest = torch.cdist(0.4 * x.sum((2, 3)) / luma.sum((2, 3)), tints).min(1)
    assert float(distance.median()) < 0.3  # the distance of any two tints is above 1
    assert len(nearest.unique()) > 1


# -- Properties of every method


@pytest.mark.parametrize("restore", METHODS)
def test_an_empty_mask_changes_no_bit_of_the_samples(restore):
    """From a given start, and from one that is drawn, which moment matching moves to the mean of the posterior."""
    nothing = Observation(Mask(torch.zeros(4, 4, dtype=torch.bool)), torch.zeros(1, *SHAPE))
    noisy = Observation(nothing.operator, nothing.y, sigma=0.3)
    sampler = AnnealedLangevinSampler(gaussian_images(SHAPE), FEW, steps_per_level=2, restore=restore)
    given = {"init": FEW.sigma_max * torch.randn(5, *SHAPE, generator=seed(1))}
    for start in [given] if restore == "moment-matching" else [given, {"n": 5, "shape": SHAPE}]:
        expected = sampler.sample(**start, generator=seed(), progress=False)
        for observation in (nothing, noisy):
            found = sampler.sample(**start, observation=observation, generator=seed(), progress=False)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("restore", METHODS)
@pytest.mark.parametrize("operator", [Mask(torch.ones(1, dtype=torch.bool)), Uncrop()])
def test_a_full_mask_gives_y(restore, operator):
    y = torch.rand(3, *SHAPE, generator=seed())
    sampler = AnnealedLangevinSampler(gaussian_images(SHAPE), FEW, steps_per_level=2, restore=restore)
    x = sampler.sample(observation=Observation(operator, y), generator=seed(), progress=False)
    assert torch.equal(x, y)


@pytest.mark.parametrize("denoise", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("restore", METHODS)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_result_agrees_with_an_observation_without_noise(name, restore, denoise):
    observation = observe(OPERATORS[name], n=2)
    options = {"steps_per_level": 2, "restore": restore, "denoise": denoise}
    sampler = AnnealedLangevinSampler(gaussian_images(SHAPE), FEW, **options)
    x = sampler.sample(observation=observation, generator=seed(), progress=False)
    measured = observation.operator.measure(x)
    if name in ("mask", "uncrop"):
        assert torch.equal(measured, observation.y)
    else:
        assert (measured - observation.y).abs().max() <= 1e-6


@pytest.mark.parametrize("name", OPERATORS)
def test_a_sampler_of_one_level_uses_an_observation(name):
    """It takes no step: its samples are the denoised images of noise with the observed part replaced."""
    world, observation, level = gaussian_images(SHAPE), observe(OPERATORS[name], 0.1), NoiseSchedule([0.5])
    operator, z = observation.operator, torch.randn(1, *SHAPE, generator=seed())
    start = 0.5 * z
    noisy = start - operator.pseudo_inverse(operator.measure(start)) + operator.pseudo_inverse(observation.y)
    expected = noisy + 0.5**2 * world(noisy, 0.5)
    torch.testing.assert_close(
        run(ODESampler(world, level, restore="replace"), observation=observation, init=start), expected
    )
    drawn = run(
        AncestralSampler(world, level, restore="replace"), observation=observation, init=start, noise_source=lambda x: z
    )
    torch.testing.assert_close(drawn, expected)


@pytest.mark.parametrize("kind", [ODESampler, AncestralSampler, AnnealedLangevinSampler, PredictorCorrectorSampler])
def test_the_result_is_as_near_to_y_as_its_noise_below_the_lowest_level(kind):
    """With noise of the lowest level in the observed part, its deviation from y was 0.1 and not 0.01."""
    world = Gaussian([0.0, 0.0], 100.0)
    observation = Observation(Mask(torch.tensor([True, False])), torch.tensor([[1.0, 0.0]]), 0.01)
    sampler = kind(world, NoiseSchedule.geometric(20, 0.1, 10))
    x = run(sampler, 100, observation=observation, generator=0)
    assert (x[:, 0] - 1).square().mean().sqrt() < 0.01


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("ratio", [0.9, *(pytest.param(ratio, marks=pytest.mark.slow) for ratio in (1.0, 1.5)), 4.0])
@pytest.mark.parametrize("value_range", [None, pytest.param((-4.0, 6.0), marks=pytest.mark.slow)])
def test_an_observation_with_more_noise_than_the_highest_level_is_used(name, ratio, value_range):
    """The change of a sample with y, which does not depend on the noise, is that of the posterior mean."""
    plain, operator = gaussian_images(SHAPE), OPERATORS[name]
    world = Gaussian(plain.mean, plain.covariance, SHAPE, value_range=value_range)
    schedule = NoiseSchedule.geometric(12, 0.02, 120)
    sampler = AncestralSampler(world, schedule, variance="small", clamp=False, restore="replace")
    y, sigma = operator.measure(torch.randn(1, *SHAPE, generator=seed(4))), 12 * ratio * math.sqrt(operator.gain)
    one, other = (Observation(operator, factor * sigma * y, sigma) for factor in (1, -1))
    found = run(sampler, observation=one, generator=0) - run(sampler, observation=other, generator=0)
    expected = world.posterior(one).mean - world.posterior(other).mean
    torch.testing.assert_close(found.flatten().double(), expected, rtol=0, atol=0.05 * float(expected.norm()))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize("restore", METHODS)
def test_a_batch_equals_its_images_sampled_one_by_one(restore, sigma):
    """With a mask and a y for each image, and also if the batch is divided for the network."""
    world = gaussian_images(SHAPE)
    observation = observe(Grayscale() @ Mask(torch.rand(3, 1, 4, 4, generator=seed(8)) > 0.5), sigma, n=3)
    sampler = AnnealedLangevinSampler(world, LEVELS, restore=restore)
    start = 8 * torch.randn(3, *SHAPE, generator=seed())
    noises = torch.randn(len(sampler), 3, *SHAPE, generator=seed(1))

    def sample(rows, batch_size):
        recorded = iter(noises[:, rows])
        part = Observation(observation.operator.rows(rows), observation.y[rows], sigma)
        return sampler.sample(
            init=start[rows],
            observation=part,
            noise_source=lambda x: next(recorded),
            batch_size=batch_size,
            progress=False,
        )

    together = sample(slice(0, 3), 3)
    torch.testing.assert_close(sample(slice(0, 3), 2), together, rtol=0, atol=1e-5)
    for i in range(3):
        torch.testing.assert_close(sample(slice(i, i + 1), 1), together[i : i + 1], rtol=0, atol=1e-5)


def test_y_of_one_image_is_used_for_all_samples():
    observation = observe(OPERATORS["mask"])
    sampler = AnnealedLangevinSampler(gaussian_images(SHAPE), LEVELS, restore="replace")
    x = sampler.sample(4, observation=observation, generator=seed(), progress=False)
    assert torch.equal(observation.operator.measure(x), observation.y.expand(4, -1, -1, -1))
    assert not torch.equal(x[0], x[1])
    assert len(sampler.sample(observation=observe(OPERATORS["mask"], n=2), generator=seed(), progress=False)) == 2


@pytest.mark.slow
def test_y_init_and_yielded_states_are_not_modified():
    observation = observe(OPERATORS["gray"], 0.1)
    y, start = observation.y.clone(), torch.randn(1, *SHAPE, generator=seed())
    before = start.clone()
    for restore in METHODS:
        sampler = AnnealedLangevinSampler(gaussian_images(SHAPE), LEVELS, steps_per_level=2, restore=restore)
        states = [(x, x.clone()) for x, _ in sampler.iterate(init=start, observation=observation, progress=False)]
        assert all(torch.equal(x, copy) for x, copy in states)  # yielded states
    assert torch.equal(observation.y, y)
    assert torch.equal(start, before)


@pytest.mark.slow
def test_each_step_takes_noise_once_and_calls_the_network_once():
    calls = {"noise": 0, "net": 0}
    world = gaussian_images(SHAPE)

    def net(x, sigma):
        calls["net"] += 1
        return world(x, sigma)

    def noise(x):
        calls["noise"] += 1
        return torch.zeros_like(x)

    for restore in METHODS:
        sampler = AnnealedLangevinSampler(net, LEVELS, restore=restore)
        calls.update(noise=0, net=0)
        sampler.sample(1, observation=observe(OPERATORS["gray"], 0.1), noise_source=noise, progress=False)
        more = restore == "moment-matching"  # the call that moves the start to the mean of the posterior
        assert calls == {"noise": len(sampler) - 1, "net": len(sampler) + more}


@pytest.mark.slow
def test_replacement_falls_back_to_guidance_without_a_gain():
    observation = observe(JPEG(10), shape=(3, 16, 16))
    world = gaussian_images((3, 16, 16), variance=0.3)
    assert isinstance(METHODS["replace"].make(observe(Grayscale()), 1.0), Replacement)
    results = [
        AnnealedLangevinSampler(world, LEVELS, restore=restore).sample(
            observation=observation, generator=seed(), progress=False
        )
        for restore in ("replace", "guide")
    ]
    assert torch.equal(*results)


@pytest.mark.slow
def test_a_restored_image_compresses_to_the_observed_jpeg(digits):
    """Except for a few of the 96 blocks, whose brightness is rounded to the next of the coarse steps of quality 5."""
    codec, digits = JPEG(5), digits.repeat(3, 1, 1, 1)
    observation = Observation(codec, codec.measure(digits))
    sampler = AnnealedLangevinSampler(ScoreNet.from_pretrained("mnist"), levels=50, restore="replace")
    x = sampler.sample(observation=observation, generator=seed(1), progress=False)
    assert (codec.measure(x) - observation.y).square().mean().sqrt() < 5 / 255
    assert (codec.measure(digits.roll(1, 0)) - observation.y).square().mean().sqrt() > 0.2  # unlike another digit
    assert (x - digits).square().mean() < (observation.y - digits).square().mean()


def test_images_of_another_size_than_the_networks_and_not_square():
    net = ScoreNet.ncsnv2(channels=1, image_size=8, width=8)
    observation = Observation(Uncrop(left=4, right=6), torch.rand(1, 1, 12, 10))
    x = AnnealedLangevinSampler(net, net.schedule.respaced(5), restore="replace").sample(
        2, observation=observation, progress=False
    )
    assert x.shape == (2, 1, 12, 20)
    assert torch.equal(observation.operator.measure(x), observation.y.expand(2, -1, -1, -1))


@pytest.mark.parametrize("restore", METHODS)
def test_a_score_of_another_shape_raises(restore):
    """It could be broadcast to the shape of the state."""
    observation = Observation(Mask(torch.tensor([True, False, True])), torch.ones(1, 3), 0.1)
    sampler = AncestralSampler(lambda x, sigma: -x[:, :1] / (1 + sigma**2), LEVELS, restore=restore)
    with pytest.raises(ValueError, match=r"the network returned shape \(1, 1\) for x of shape \(1, 3\)"):
        run(sampler, observation=observation)


def test_guide_jacobian_needs_a_score_that_is_differentiable():
    sampler = AnnealedLangevinSampler(
        torch.no_grad()(lambda x, sigma: -x), NoiseSchedule([0.3, 0.2]), steps_per_level=1, restore="guide-jacobian"
    )
    with pytest.raises(ValueError, match=r"score must be differentiable in x, but it was computed without gradients"):
        sampler.sample(1, observation=Observation(Mask(torch.arange(8) < 4), torch.rand(1, 1, 8, 8)), progress=False)


def test_guidance_with_classes_that_were_made_in_inference_mode():
    net = ScoreNet.unet(1, 8, widths=(4,), classes=3)
    observation = Observation(Mask(torch.arange(8) < 4), torch.rand(2, 1, 8, 8))
    options = {"restore": "guide-jacobian", "precision": "float32", "steps_per_level": 1}
    sampler = AnnealedLangevinSampler(net, NoiseSchedule([0.3, 0.2]), **options)
    with torch.inference_mode():
        classes = torch.tensor([0, 2])
    x, y = (
        sampler.sample(2, condition=condition, observation=observation, generator=0, progress=False)
        for condition in (classes, torch.tensor([0, 2]))
    )
    assert torch.equal(x, y)


def test_guidance_leaves_no_gradients_and_keeps_the_callers_grad_mode():
    net = ScoreNet.ncsnv2(channels=1, image_size=8, width=8)
    sampler = AnnealedLangevinSampler(net, NoiseSchedule([0.3, 0.2]), steps_per_level=1, restore="guide-jacobian")
    observation = Observation(Mask(torch.arange(8) < 4), torch.rand(1, 1, 8, 8))
    for x, _ in sampler.iterate(1, observation=observation, progress=False):
        assert not x.requires_grad
        assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler",
    [
        lambda world: ODESampler(world, levels=150, churn=60, restore="replace"),
        lambda world: ODESampler(world, levels=150, method="unipc", eta=5, restore="replace"),
        lambda world: AnnealedLangevinSampler(world, levels=150, step_size=0.5e-4, consistent=True, restore="replace"),
    ],
    ids=["churn", "multistep", "consistent"],
)
def test_steps_that_add_much_noise_do_not_forget_a_noisy_observation(sampler):
    """Without a limit of the noise below the level of y, the first mean was 0.62 and 0.53 instead of 0.8."""
    levels = NoiseSchedule.geometric(10, 0.01, 150)
    world = Gaussian([0.5, 0.5], [[0.09, 0.072], [0.072, 0.09]], schedule=levels)
    observation = Observation(Mask(torch.tensor([True, False])), torch.tensor([[1.1, 0.0]]), 0.3)
    posterior = world.posterior(observation)
    x = run(sampler(world), 4000, observation=observation, generator=0).double()
    torch.testing.assert_close(x.mean(0), posterior.mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(0), posterior.covariance.diagonal().sqrt(), rtol=0.1, atol=0)


def test_the_first_step_to_a_level_below_the_noise_of_y_adds_new_noise():
    """The score is zero, and the noise of y is 1, between the two levels. The same noise twice gave 4.9."""
    schedule, observation = NoiseSchedule([2.0, 0.5]), Observation(Mask(torch.tensor([True])), torch.ones(1, 1), 1.0)
    sampler = AncestralSampler(
        lambda x, sigma: torch.zeros_like(x), schedule, variance="small", denoise=False, restore="replace"
    )
    x = run(sampler, 10_000, shape=(1,), observation=observation, generator=0)
    expected = (2**2 - 1) + 0.5**2 * (2**2 - 0.5**2) / 2**2
    assert abs(float(x.var()) / expected - 1) < 5 * math.sqrt(2 / 10_000)


@pytest.mark.parametrize("kind", [NoiseSchedule.geometric, NoiseSchedule.karras])
def test_consistent_steps_that_add_little_noise_give_the_posterior_of_a_noisy_image(kind):
    """With the small step of networks also below the noise of y, deviations were 0.44 and 0.87 times the exact ones."""
    schedule = kind(10, 0.01, 150)
    world = Gaussian([0.5, 0.5], [[0.09, 0.072], [0.072, 0.09]], schedule=schedule)
    observation = Observation(Mask(torch.tensor([True])), torch.tensor([[1.1, 0.4]]), 0.3)
    posterior = world.posterior(observation)
    x = run(
        AnnealedLangevinSampler(world, schedule, restore="replace"), 4000, observation=observation, generator=0
    ).double()
    torch.testing.assert_close(x.mean(0), posterior.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(torch.cov(x.T), posterior.covariance, rtol=0.1, atol=0.001)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [False, True])
def test_guidance_is_exact_for_data_with_the_standard_deviation_sigma_data(guided):
    """A backbone that returns zero is the score of N(0, sigma_data^2)."""
    options = {"sigma_data": 100.0}
    net = ScoreNet(_Zero(), NoiseSchedule.geometric(2000, 1, 100), sample_shape=(2,), precondition_options=options)
    score = autoguidance(net, net, 1.0) if guided else net
    y = torch.tensor([[80.0, -40.0]])
    sampler = AncestralSampler(score, variance="small", restore="guide")
    x = sampler.sample(2000, observation=Observation(_Identity(), y, sigma=50.0), generator=0, progress=False)
    torch.testing.assert_close(x.mean(0), y[0] * 0.8, rtol=0, atol=5)  # v / (v + sigma_y^2) is 0.8


class _Zero(torch.nn.Module):
    def forward(self, x, c_noise):
        return torch.zeros_like(x)


class _Identity(Operator):
    """Has a gain of 1, but does not say so."""

    def measure(self, x):
        return x


# -- Bad input


def test_an_observation_that_does_not_fit_raises():
    world = gaussian_images(SHAPE)
    sampler = AnnealedLangevinSampler(world, LEVELS, restore="replace")
    with pytest.raises(ValueError, match="disagree on the number of samples: 3 from n, 2 from observation"):
        sampler.sample(3, observation=observe(OPERATORS["mask"], n=2))
    with pytest.raises(ValueError, match=r"4 from n, 1 from condition\. .* write condition\.repeat_interleave\(n, 0\)"):
        sampler.sample(4, condition=torch.zeros(1, *SHAPE))
    with pytest.raises(
        ValueError, match=r"\(3, 8, 8\), but Observation\(Grayscale\(\), .* is of samples of shape \(3, 4, 4\)\."
    ):
        sampler.sample(1, shape=(3, 8, 8), observation=observe(Grayscale()))
    with pytest.raises(TypeError, match="observation must be an Observation, got Tensor"):
        sampler.sample(1, observation=torch.rand(1, *SHAPE))
    with pytest.raises(ValueError, match="restore must be one of 'auto', 'replace'"):
        AnnealedLangevinSampler(world, LEVELS, restore="repaint")


@pytest.mark.slow
def test_an_operator_that_is_only_a_function_measures_samples_of_the_shape_of_the_network():
    """y does not tell the shape of a sample, so that the observation is checked when the sampler knows it."""
    operator = type("Own", (Operator,), {"measure": lambda self, x: x.flatten(1)[:, :5] ** 3, "linear": False})()
    y = torch.full((1, 5), 0.125)
    observation = Observation(operator, y)
    assert observation.shape is None and observation.of_shape((3, 4, 4)).shape == (3, 4, 4)
    x = AnnealedLangevinSampler(gaussian_images(SHAPE), LEVELS, restore="guide").sample(
        2, shape=SHAPE, observation=observation, generator=0, progress=False
    )
    assert x.shape == (2, *SHAPE)
    with pytest.raises(ValueError, match=r"y must have shape \(4,\) for each image, .*, got \(5,\)"):
        observation.of_shape((1, 2, 2))


@pytest.mark.slow
def test_clamping_y_to_the_value_range_gives_a_warning(recwarn):
    net = ScoreNet.ncsnv2(channels=1, image_size=8, width=8)
    schedule = net.schedule.respaced(3)
    y = torch.full((1, 1, 8, 8), 1.25)
    left = Mask(torch.arange(8) < 4)
    with pytest.warns(
        UserWarning, match=r"values range from 1.25 to 1.25, outside the network's value_range \(0.0, 1.0\)"
    ) as caught:
        x = AnnealedLangevinSampler(net, schedule, restore="replace").sample(
            observation=Observation(left, y), progress=False
        )
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert x.max() <= 1
    x = AnnealedLangevinSampler(net, schedule, clamp=False, restore="replace").sample(
        observation=Observation(left, y), progress=False
    )
    assert torch.equal(left.measure(x), left.measure(y))
    AnnealedLangevinSampler(net, schedule, restore="replace").sample(
        observation=Observation(left, y, sigma=0.5), progress=False
    )
    hidden = torch.where(torch.arange(8) < 4, 0.5, 7.0).expand(1, 1, 8, 8)
    AnnealedLangevinSampler(net, schedule, restore="replace").sample(
        observation=Observation(left, hidden), progress=False
    )
    assert len(recwarn) == 0


class _Sums(Operator):
    """The sum of each row."""

    gain = 8.0

    def measure(self, x):
        return x.sum(-1)

    def pseudo_inverse(self, y):
        return (y / 8)[..., None].expand(*y.shape, 8)


def test_a_measurement_in_other_units_than_the_image_gives_no_warning(recwarn):
    net = ScoreNet.ncsnv2(channels=1, image_size=8, width=8)
    y = _Sums().measure(torch.rand(1, 1, 8, 8, generator=seed()))
    assert y.max() > 1
    x = AnnealedLangevinSampler(net, levels=3, restore="replace").sample(
        observation=Observation(_Sums(), y), progress=False
    )
    assert x.shape == (1, 1, 8, 8)
    assert len(recwarn) == 0


@pytest.mark.parametrize("operator", [JPEG(90), AveragePool(2), Grayscale(), Uncrop(left=2)], ids=repr)
def test_a_measurement_in_units_of_the_image_gives_a_warning(operator):
    net = ScoreNet.ncsnv2(channels=3, image_size=8, width=8)
    y = operator.measure(torch.rand(1, 3, 8, 8, generator=seed())) + 1
    with pytest.warns(UserWarning, match="outside the network's value_range"):
        AnnealedLangevinSampler(net, levels=3, restore="replace").sample(
            observation=Observation(operator, y), progress=False
        )


class _Dimmed(Operator):
    def __init__(self, factor):
        self.factor, self.gain = factor, factor**2

    def measure(self, x):
        return self.factor * x

    def pseudo_inverse(self, y):
        return y / self.factor


@pytest.mark.parametrize(("factor", "warned"), [(0.975, False), (0.985, True), (1.015, True), (1.025, False)])
def test_a_measurement_may_miss_the_units_of_the_image_by_2_percent(factor, warned):
    net = ScoreNet.ncsnv2(channels=1, image_size=8, width=8)
    observation = Observation(_Dimmed(factor), torch.full((1, 1, 8, 8), 1.25))
    with pytest.warns(UserWarning, match="outside the network's value_range") if warned else nullcontext():
        AnnealedLangevinSampler(net, levels=3, restore="replace").sample(observation=observation, progress=False)


@pytest.mark.parametrize("operator", [Mask(torch.arange(4) < 2), Grayscale() @ Mask(torch.arange(4) < 2)])
def test_hidden_values_give_no_warning_for_a_value_range_without_zero(operator, recwarn):
    world = Gaussian([1.5] * 48, 0.01, SHAPE, schedule=LEVELS, value_range=(1, 2))
    observation = Observation(operator, operator.measure(torch.full((1, *SHAPE), 1.5)))
    ODESampler(world, levels=3, restore="replace").sample(2, observation=observation, progress=False)
    nothing = Observation(Mask(torch.zeros(4, dtype=torch.bool)), torch.zeros(1, *SHAPE))
    ODESampler(world, levels=3, restore="replace").sample(2, observation=nothing, progress=False)
    assert len(recwarn) == 0


def test_jpeg_needs_images_from_0_to_1():
    """JPEG clamps negative values, so that a guided network of another range would be led astray without notice."""

    def score(x, sigma):
        return -x / (0.25 + sigma**2)

    score.value_range = (-1.0, 1.0)
    for operator in (JPEG(10), JPEG(10) @ Grayscale(), AveragePool(2) @ JPEG(10)):
        observation = Observation(operator, operator.measure(torch.rand(1, 3, 16, 16)))
        with pytest.raises(
            ValueError, match=r"is for images in \(0, 1\), but the network's value_range is \(-1.0, 1.0\)"
        ):
            ODESampler(score, LEVELS, restore="guide").sample(2, observation=observation, progress=False)


def test_the_noise_level_of_an_observation_may_be_a_number_of_numpy():
    """In float32 its square could be above that of an equal level, and the root of the difference NaN."""
    left, y = Mask(torch.arange(4) < 2), torch.zeros(1, 3, 4, 4)
    sampler = AncestralSampler(lambda x, sigma: -x / (1 + sigma**2), NoiseSchedule([2.0, 0.4, 0.1]), restore="replace")
    numbers = np.float32(0.4), float(np.float32(0.4))
    a, b = (run(sampler, 2, observation=Observation(left, y, sigma=number), generator=0) for number in numbers)
    assert torch.equal(a, b)
