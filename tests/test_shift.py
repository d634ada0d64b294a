"""The singular value decompositions of operators, and restoration by a shift of the state against exact posteriors."""

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation.exact import Gaussian, GaussianMixture, operator_matrix
from scorematch.restoration import (
    JPEG,
    AveragePool,
    Blur,
    Fourier,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Linear,
    Mask,
    Matrix,
    MotionBlur,
    Observation,
    Resize,
    Uncrop,
    moments,
)
from scorematch.restoration import shift as method
from scorematch.restoration.cosine import CosineCovariance
from scorematch.sampling import AncestralSampler, ODESampler
from tests.helpers import gaussian_images, run, seed

SHAPE = (3, 4, 4)


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number), dtype=torch.float64)


SUMS = Linear(lambda x: x.cumsum(-1)[..., 1:])
OPERATORS = [
    Mask(random(3, 4, 4) > 0),
    Mask(random(2, 1, 4, 4) > 0),
    Uncrop(right=2, top=1),
    Grayscale() @ AveragePool(2),
    AveragePool(2) @ Mask(torch.arange(4) < 2),
    SUMS,
    SUMS @ Grayscale(),
    GaussianBlur(0.3),
    Blur(random(3, 3)),  # not symmetric: its singular vectors of y are others than those of x
    Blur(random(3, 3), "reflect"),
    Blur(random(3), "zeros") @ Grayscale(),
    MotionBlur(3, 20) @ AveragePool(1),
    Resize(2),
    Resize(2) @ Grayscale(),
    Fourier(random(4, 4) > 0),
    Fourier(random(4, 4) > 0) @ Grayscale(),
    Fourier(random(4, 4) > 0, random(2, 4, 4)),
    FourierLines(3),
    Matrix(random(5, 48)),
    Matrix(random(5, 2) @ random(2, 48)),
    Matrix(random(60, 48)),
]
MORE = {3, 4, 6, 9, 10, 11, 13, 15, 16, 19}  # compositions, and other kinds of the same operator


@pytest.mark.parametrize("operator", OPERATORS, ids=repr)
def test_a_decomposition_is_that_of_the_operator(operator):
    x = random(2, *SHAPE)
    y = operator.measure(x)
    svd = operator.decomposition(x)
    c = svd.coefficients(x)
    seen = (svd.values > 0).expand_as(c)
    rotated = y if svd.measured is None else svd.measured(y)
    assert torch.allclose(svd.values * c, rotated)  # S V^T x = U^T A x
    assert torch.allclose(operator.measure(svd.sample(c)), y)  # A V V^T x = A x
    d = torch.where(seen, torch.randn_like(c), 0)
    assert torch.allclose(svd.coefficients(svd.sample(d)), d)  # V^T V = I
    v = operator.measure(random(2, *SHAPE, number=1))
    rotated = v if svd.measured is None else svd.measured(v)
    assert torch.allclose(svd.sample(svd.values * rotated), operator.adjoint(v, SHAPE))  # V S U^T v = A^T v


def test_the_singular_values_are_those_of_the_matrix():
    a = random(5, 2) @ random(2, 48)
    values = Matrix(a).decomposition(random(1, *SHAPE)).values
    assert torch.allclose(values, torch.linalg.svdvals(a), atol=1e-12) and int((values > 0).sum()) == 2
    sums = SUMS.decomposition(random(1, *SHAPE)).values
    assert torch.allclose(sums, torch.linalg.svdvals(operator_matrix(SUMS, SHAPE)))


def test_operators_without_a_cheap_decomposition_have_none():
    assert JPEG(5).decomposition(random(1, *SHAPE)) is None
    for operator in (SUMS, GaussianBlur(1, boundary="zeros"), SUMS @ AveragePool(1), Mask(torch.ones(1) > 0) @ SUMS):
        assert operator.decomposition(torch.zeros(1, 3, 64, 64)) is None


@pytest.mark.parametrize("operator", [GaussianBlur(2), Resize(4), FourierLines(4), Resize(4) @ Grayscale()], ids=repr)
def test_decompositions_of_large_images(operator):
    """They need no matrix of the whole image, and float32 is enough."""
    x = random(1, 3, 64, 64).float()
    svd, y = operator.decomposition(x), operator.measure(x)
    assert torch.allclose(operator.measure(svd.sample(svd.coefficients(x))), y, atol=1e-5)
    assert torch.allclose(svd.values * svd.coefficients(x), svd.measured(y), atol=1e-5)


# -- Restoration


def observe(operator, sigma=0.2):
    y = operator.measure(random(2, *SHAPE, number=2))
    return Observation(operator, y, sigma).of_shape(SHAPE)


def noises(operator):
    """One number, one for each value of y with 0 and infinity among them, and the product with a precision."""
    levels = operator.measure(random(2, *SHAPE, number=3)).abs()
    return 0.2, torch.where(levels > 0.3, 0.3, torch.where(levels > 0.05, levels, torch.inf)), lambda v: 4 * v


def expected_score(world, observation, x, sigma):
    """The score of x given y, from the posterior of x0 with the mean D and the covariance sigma^2 J."""
    values = world.values * sigma**2 / (world.values + sigma**2)
    covariance = world.vectors * values @ world.vectors.T
    denoised = (x + sigma**2 * world(x, sigma)).flatten(1)
    means = [
        Gaussian(mean, (covariance + covariance.T) / 2, SHAPE).posterior(observation, i).mean
        for i, mean in enumerate(denoised)
    ]
    return (torch.stack(means).view_as(x) - x) / sigma**2


@pytest.mark.parametrize(
    ("kind", "operator"),
    [
        pytest.param(i % 3, each, marks=pytest.mark.slow if i in MORE else (), id=repr(each))
        for i, each in enumerate(OPERATORS)
    ],
)
def test_the_steps_converge_to_the_exact_score_of_gaussian_data(kind, operator, monkeypatch):
    """Without damping, at one level, whatever the noise of y is."""
    monkeypatch.setattr(method, "_DAMPING", 0.0)
    root = random(48, 48, number=4) / 7
    world = Gaussian(torch.zeros(48), root @ root.T + 0.1 * torch.eye(48), SHAPE)
    x, sigma = random(2, *SHAPE, number=5), 0.8
    observation = observe(operator, noises(operator)[kind])
    shift = method.Shift(observation, 1.0)
    for _ in range(30):
        found = shift.score(world, x, sigma, slice(0, 2))
    torch.testing.assert_close(found, expected_score(world, observation, x, sigma), rtol=1e-4, atol=1e-4)


LEVELS = NoiseSchedule.geometric(10, 0.02, 60)


@pytest.mark.parametrize("kind", [pytest.param(AncestralSampler, marks=pytest.mark.slow), ODESampler])
@pytest.mark.parametrize(
    "operator",
    [
        OPERATORS[0],
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (GaussianBlur(0.3), Resize(2), Fourier(random(4, 4) > 0))
        ),
    ],
    ids=repr,
)
def test_the_draws_are_those_of_the_posterior_of_gaussian_data(operator, kind):
    world = gaussian_images(SHAPE)
    truth = world.sample(1, seed(1))
    observation = Observation(operator, operator.measure(truth), 0.3)
    sampler = kind(world, LEVELS, restore="shift")
    x = run(sampler, 500, shape=SHAPE, observation=observation, generator=0)
    posterior = world.posterior(observation)
    along = (x.flatten(1).double() - posterior.mean) @ posterior.vectors / posterior.values.sqrt()
    assert along.mean(0).square().mean().sqrt() < 0.15
    assert abs(along.var(0).mean() - 1) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS[2:4] + OPERATORS[7:9], ids=repr)
def test_a_matrix_restores_like_the_operator_whose_matrix_it_is(operator, monkeypatch):
    monkeypatch.setattr(moments, "_INNER", 48)  # the linear systems are solved completely
    monkeypatch.setattr(moments, "_INNER_TOLERANCE", 1e-4)
    world, y = gaussian_images(SHAPE), operator.measure(torch.rand(1, *SHAPE, generator=seed()))
    same = Matrix(operator_matrix(operator, SHAPE))
    sampler = ODESampler(world, LEVELS.respaced(20), method="unipc", restore="shift")
    one, other = (
        run(sampler, 3, shape=SHAPE, observation=observation, generator=0)
        for observation in (Observation(operator, y, 0.1), Observation(same, y.flatten(1), 0.1))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_only_a_score_that_is_not_linear_is_damped():
    """The steps of a normal distribution are not, whatever its covariance is."""
    observation, root = observe(OPERATORS[0]), random(48, 48, number=4) / 7
    bends = []
    for means in (torch.zeros(1, 48), random(3, 48, number=6)):
        world = GaussianMixture([1 / len(means)] * len(means), means, root @ root.T, SHAPE)
        shift = method.Shift(observation, 1.0)
        for sigma in (10.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0):
            shift.score(world, sigma * random(2, *SHAPE, number=5 + int(sigma)), sigma, slice(0, 2))
        bends.append(shift._steps[0].bend)
    left = 1 / 2**5  # of the first value
    torch.testing.assert_close(bends[0], torch.full_like(bends[0], left), rtol=0, atol=1e-6)
    assert bool((bends[1] > 4 * left).all())


@pytest.mark.slow
def test_an_observation_with_much_noise_changes_nothing():
    world = gaussian_images(SHAPE)
    sampler = AnnealedLangevinSampler(world, LEVELS.respaced(20), restore="shift")
    useless = Observation(GaussianBlur(0.3), 1e3 * torch.randn(1, *SHAPE, generator=seed()), 1e6)
    x, free = (run(sampler, 3, shape=SHAPE, observation=y, generator=0) for y in (useless, None))
    torch.testing.assert_close(x, free, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_a_network_in_bfloat16_gives_nearly_the_same():
    world = gaussian_images(SHAPE)
    observation = Observation(OPERATORS[0], torch.rand(1, *SHAPE, generator=seed()), 0.1)
    samplers = [
        AncestralSampler(score, LEVELS.respaced(20), restore="shift")
        for score in (world, lambda x, sigma: world(x, sigma).bfloat16())
    ]
    x, rounded = (run(sampler, 50, observation=observation, generator=0) for sampler in samplers)
    assert (rounded - x).square().mean().sqrt() < 0.03


def test_the_estimate_of_the_covariance_is_made_once(monkeypatch):
    """Its bands need a sort of all frequencies, which takes longer than a network for large images."""
    made = []
    for module in (method, moments):
        monkeypatch.setattr(
            module, "CosineCovariance", lambda *given: made.append(CosineCovariance(*given)) or made[-1]
        )
    for name in ("shift", "moment-matching"):
        sampler = ODESampler(Gaussian([0.0, 1.0], 1.0), NoiseSchedule.geometric(4, 0.1, 4), restore=name)
        run(sampler, 2, observation=Observation(Mask(torch.tensor([True, False])), torch.zeros(1, 2)), generator=0)
    assert len(made) == 2
