"""Signals with heavy-tailed increments: Gibbs sampling against integrals, and against its Gaussian limit."""

import math

import pytest
import torch
from torch import distributions

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation import posterior_calibration
from scorematch.evaluation.exact import Gaussian
from scorematch.evaluation.levy import Laplace, LevyProcess, Student
from scorematch.restoration import Mask, Matrix, Observation
from tests.helpers import run, seed

INCREMENTS = {"laplace": Laplace(0.8), "student": Student(4.0, 0.6)}
every_kind = pytest.mark.parametrize("kind", INCREMENTS)
A = torch.tensor([[1.0, 1.0], [0.0, 0.5]])


def torch_law(kind):
    return distributions.Laplace(0.0, 0.8) if kind == "laplace" else distributions.StudentT(4.0, 0.0, 0.6)


@pytest.fixture(scope="module")
def grid():
    """All signals of two values on a grid."""
    g = torch.linspace(-16, 16, 401, dtype=torch.float64)
    return torch.stack(torch.meshgrid(g, g, indexing="ij"), -1).view(-1, 2)


def moments(grid, log_density):
    """The mean and the covariance of a density on the grid."""
    w = log_density.softmax(0)
    mean = w @ grid
    return mean, (w * (grid - mean).T) @ (grid - mean)


@every_kind
def test_densities_are_those_of_torch(kind):
    u = torch.linspace(-3, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(INCREMENTS[kind].log_density(u), torch_law(kind).log_prob(u))
    x = torch.tensor([[1.0, -0.5, 2.0]], dtype=torch.float64)
    expected = torch_law(kind).log_prob(torch.tensor([1.0, -1.5, 2.5])).sum()
    assert float(LevyProcess(INCREMENTS[kind], 3).log_density(x)) == pytest.approx(float(expected))


@every_kind
def test_increments_have_their_distribution_and_the_covariance_of_a_walk(kind):
    law = INCREMENTS[kind]
    n, world = 50_000, LevyProcess(law, 3)
    x = world.sample(n, 0, torch.float64)
    u = torch.diff(x, dim=1, prepend=torch.zeros(n, 1))
    for level in (0.1, 0.3):
        inside = float((u.abs() < level).double().mean())
        grid = torch.linspace(-level, level, 2001, dtype=torch.float64)
        expected = float(torch.trapezoid(law.log_density(grid).exp(), grid))
        assert abs(inside - expected) < 4 * math.sqrt(expected / (3 * n))
    torch.testing.assert_close(
        world.covariance, law.variance * torch.tensor([[1, 1, 1], [1, 2, 2], [1, 2, 3]]).double()
    )
    assert float(u.square().mean()) == pytest.approx(law.variance, rel=0.05)


@every_kind
def test_variances_given_increments_have_the_distribution_of_the_prior_again(kind):
    """If tau is drawn from the prior and u given tau, tau given u is again of the prior: the Gibbs step leaves it."""
    law, generator, n = INCREMENTS[kind], seed(), 100_000
    tau = law.prior((n,), generator)
    u = tau.sqrt() * torch.randn(n, generator=generator, dtype=torch.float64)
    again = law.given(u, generator)
    for level in (0.1, 0.5, 0.9):
        below = float((again < tau.quantile(level)).double().mean())
        assert abs(below - level) < 5 * math.sqrt(2 * level * (1 - level) / n)
    # Jointly too: the product of u^2 and 1/tau has the mean 1 only if tau was drawn given this u.
    ratio = u.square() / again
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(n)


@pytest.mark.parametrize("kind", ["laplace", pytest.param("student", marks=pytest.mark.slow)])
def test_posterior_draws_have_the_moments_of_numerical_integration(kind, grid):
    world = LevyProcess(INCREMENTS[kind], 2)
    y = torch.tensor([[1.0, 2.0], [0.3, -1.0]])
    noise = torch.tensor([[0.3, 0.5]])
    draws = world.posterior_samples(Observation(Matrix(A), y, noise), 1500, 0, apart=2)
    assert draws.shape == (2, 1500, 2)
    for i in range(2):
        likelihood = ((grid @ A.T.double() - y[i].double()) / noise.double()).square().sum(1) / 2
        mean, covariance = moments(grid, world.log_density(grid) - likelihood)
        error = covariance.diagonal().sqrt() / math.sqrt(1500)
        assert ((draws[i].mean(0) - mean).abs() < 8 * error).all()  # neighboring draws are correlated
        torch.testing.assert_close(torch.cov(draws[i].T), covariance, rtol=0.2, atol=0.03)


@every_kind
@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_the_score_and_its_jacobian_are_those_of_numerical_integration(kind, sigma, grid):
    world, copies = LevyProcess(INCREMENTS[kind], 2, sweeps=40), 100  # each row has its own random numbers
    points = torch.tensor([[0.5, 2.5], [3.0, -1.0]], dtype=torch.float64).requires_grad_()
    x = points.repeat(copies, 1)
    denoised = (x + sigma**2 * world(x, sigma)).view(copies, 2, 2).mean(0)
    jacobian = [torch.autograd.grad(denoised[:, k].sum(), points, retain_graph=True)[0] for k in range(2)]
    for i in range(2):
        noisy = world.log_density(grid) - (grid - points[i].detach()).square().sum(1) / (2 * sigma**2)
        mean, covariance = moments(grid, noisy)
        torch.testing.assert_close(denoised[i].detach(), mean, rtol=0, atol=0.04)
        torch.testing.assert_close(torch.stack(jacobian, 1)[i], covariance / sigma**2, rtol=0, atol=0.04)
    assert torch.equal(world(x, sigma), world(x, sigma))


@pytest.mark.slow
def test_with_many_degrees_of_freedom_signals_are_gaussian():
    world = LevyProcess(Student(4000.0), 6, (1, 6), sweeps=8)
    gaussian = Gaussian(torch.zeros(6), world.covariance, (1, 6))
    x = torch.randn(4, 1, 6, generator=seed(), dtype=torch.float64).requires_grad_()
    v = torch.randn(4, 1, 6, generator=seed(1), dtype=torch.float64)
    torch.testing.assert_close(world(x, 0.7), gaussian(x, 0.7), rtol=0.05, atol=0.05)
    products = [torch.autograd.grad((each(x, 0.7) * v).sum(), x)[0] for each in (world, gaussian)]
    torch.testing.assert_close(*products, rtol=0.05, atol=0.05)
    # Every second value is measured, with noise of another level for each; the last one is not measured at all.
    sigma = torch.tensor([0.2, 0.2, 0.4, 0.4, math.inf, math.inf])
    observation = Observation(Mask(torch.arange(6) % 2 == 0), torch.ones(2, 1, 6), sigma)
    draws = world.posterior_samples(observation, 2000, 1, burn_in=20, apart=1).view(2, 2000, 6)
    expected = gaussian.posterior(observation)
    deviations = expected.covariance.diagonal().sqrt()
    assert ((draws.mean(1) - expected.mean).abs() < 5 * deviations / math.sqrt(2000)).all()
    torch.testing.assert_close(draws.std(1), deviations.expand(2, 6), rtol=0.08, atol=0)


def test_a_covariance_gives_the_posterior_of_equal_noise_levels():
    world = LevyProcess(Laplace(), 4)
    y = torch.tensor([[0.5, 1.0, -1.0, 0.0]])
    everything = Mask(torch.ones(4, dtype=torch.bool))
    draws = [
        world.posterior_samples(Observation(everything, y, sigma), 20, 0)
        for sigma in (0.3, torch.full((4,), 0.3), lambda v: v / 0.09)
    ]
    for each in draws[1:]:
        torch.testing.assert_close(each, draws[0], rtol=0, atol=1e-4)


@pytest.mark.slow
@every_kind
def test_langevin_dynamics_with_the_score_draws_signals(kind):
    world = LevyProcess(INCREMENTS[kind], 8, sweeps=8, schedule=NoiseSchedule.geometric(12, 0.05, 30))
    x = run(AnnealedLangevinSampler(world, consistent=True), 400, generator=0)
    u = torch.diff(x, dim=1, prepend=torch.zeros(400, 1)).double()
    assert float(u.abs().mean()) == pytest.approx(float(torch_law(kind).sample((100_000,)).abs().mean()), rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize(("change", "accepted"), [(1.0, True), (0.7, False)])
def test_exact_draws_are_accepted_and_overconfident_ones_rejected(change, accepted):
    world, half = LevyProcess(Laplace(), 8), Mask(torch.arange(8) % 2 == 0)

    class Draws:
        """In place of a sampler: draws of a Gibbs sampler, with their deviations from the mean multiplied."""

        def sample(self, n, *, observation, generator, progress):
            x = world.posterior_samples(observation.rows(slice(0, n, 9)), 9, generator, apart=8)
            return (x.mean(1, keepdim=True) + change * (x - x.mean(1, keepdim=True))).flatten(0, 1)

    exact, found = posterior_calibration(
        world, half, {"gibbs": Draws()}, sigma=0.5, observations=150, draws=9, progress=False
    )
    assert exact.p_value > 1e-3
    assert (found.p_value > 1e-3) == accepted
    assert found.spread.value == pytest.approx(change, abs=0.05)
    # The draws are changed around their own mean, whose variance is 1/9 of that of a draw.
    assert found.shift == pytest.approx(math.sqrt((1 - change**2) / 9), abs=0.12)
    nominal, share = found.coverage(1)
    assert (abs(share.value - nominal) < 4 * share.error) == accepted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Student(2.0), "degrees must be above 2, so that the variance is finite, got 2.0"),
        (lambda: Student(3.0, -1.0), "scale must be positive and finite, got -1.0"),
        (lambda: Laplace(0.0), "scale must be positive and finite, got 0.0"),
        (lambda: LevyProcess(Laplace(), 4, (2, 3)), r"sample_shape must have 4 values, like the signals, got \(2, 3\)"),
        (lambda: LevyProcess(Laplace(), 0), "size must be an integer of at least 1, got 0"),
        (lambda: LevyProcess(Laplace(), 2).log_density(torch.zeros(1, 2), 0.1), "the density of signals with noise"),
        (
            lambda: LevyProcess(Laplace(), 2).posterior_samples(Observation(Matrix(A), torch.zeros(1, 2)), 2),
            "the observation must have noise: pass a sigma above 0",
        ),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
