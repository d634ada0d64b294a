"""Decoupled sampling against exact posteriors: closed forms, and integrals on a grid for nonlinear operators."""

import functools

import pytest
import torch

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation.exact import Gaussian, GaussianMixture
from scorematch.restoration import (
    AveragePool,
    Clip,
    GaussianBlur,
    Linear,
    Magnitude,
    Mask,
    Matrix,
    Observation,
    Operator,
    Quantize,
)
from scorematch.restoration.likelihood import Likelihood
from scorematch.sampling import DecoupledSampler
from tests.helpers import run, seed

LEVELS = NoiseSchedule.geometric(4, 0.02, 60)
FEW = NoiseSchedule.geometric(4, 0.02, 6)
GRID = torch.cartesian_prod(*[torch.linspace(-4, 4, 400)] * 2)
ROUND = Gaussian([0.6, 0.3], 1.0, schedule=LEVELS)  # with the variance that the sampler takes a score to have
LONG = Gaussian([0.6, 0.3], [[1.2, 0.7], [0.7, 0.8]], schedule=LEVELS)
TWO = GaussianMixture([0.3, 0.7], [[-1.0, 0.0], [1.0, 0.5]], [[0.3, 0.18], [0.18, 0.3]], schedule=LEVELS)


class Square(Operator):
    """The squared distance from zero."""

    def measure(self, x):
        return x.square().sum(1, keepdim=True)

    def sample_shape(self, y):
        return (2,)


def grid_posterior(log_prior, observation):
    """The probabilities of the points of the grid."""
    r = observation.residual(observation.operator.measure(GRID))
    log_likelihood = -(r * observation.precision(r)).sum(1) / 2
    return (log_prior + log_likelihood).double().softmax(0)


@functools.cache
def _directions():
    """Four directions, each with the sorted projections of the grid and their order."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7], [0.7, -0.7]])
    return [(direction, *(GRID @ direction).sort()) for direction in directions]


def distance(x, weights):
    """The largest difference of distribution functions, over four directions, of draws (n, 2) and the grid."""
    largest = 0.0
    for direction, places, order in _directions():
        drawn = (x @ direction).sort().values
        shares = (torch.arange(len(x)) + 0.5) / len(x)
        known = weights[order].cumsum(0)[torch.searchsorted(places, drawn).clamp(max=len(places) - 1)]
        largest = max(largest, float((known - shares).abs().max()))
    return largest


def spread(x, weights):
    """The standard deviations of draws (n, 2) along the axes of the posterior, divided by those of the posterior."""
    grid = GRID.double()
    values, vectors = torch.linalg.eigh(
        (grid * weights[:, None]).T @ grid - torch.outer(weights @ grid, weights @ grid)
    )
    return (x.double() @ vectors).std(0) / values.sqrt()


@pytest.mark.parametrize(
    ("world", "operator"),
    [
        (LONG, Clip(0, 1)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((TWO, Clip(-0.5, 0.5)), (LONG, Magnitude(2)), (TWO, Square()), (LONG, Quantize(3)))
        ),
    ],
    ids=str,
)
def test_draws_are_nearer_to_the_posterior_of_a_nonlinear_measurement_than_those_of_guidance(world, operator):
    observation = Observation(operator, operator.measure(torch.tensor([[1.3, 0.6]])), 0.15)
    weights = grid_posterior(world.log_density(GRID), observation)
    arguments = {"shape": (2,), "observation": observation, "generator": 0}
    guided = AnnealedLangevinSampler(world, levels=20, consistent=True, restore="guide-jacobian")  # of the same cost
    found, other = (run(sampler, 400, **arguments) for sampler in (DecoupledSampler(world), guided))
    print(f"\n{operator}:", *((f"{distance(x, weights):.2f}", spread(x, weights).tolist()) for x in (found, other)))
    assert distance(found, weights) < 0.15 and distance(found, weights) < 0.7 * distance(other, weights)
    assert (spread(found, weights) - 1).abs().max() < 0.25


@pytest.mark.slow
def test_draws_are_those_of_the_exact_posterior_of_a_linear_measurement():
    observation = Observation(Matrix(torch.tensor([[1.0, 0.5]])), torch.tensor([[1.2]]), 0.3)
    x = run(DecoupledSampler(ROUND), 1000, shape=(2,), observation=observation, generator=0).double()
    exact = ROUND.posterior(observation)
    values, vectors = torch.linalg.eigh(exact.covariance)
    along = (x - exact.mean) @ vectors / values.sqrt()
    assert along.mean(0).abs().max() < 4 / 1000**0.5
    assert (along.std(0) - 1).abs().max() < 4 / 2000**0.5 + 0.01


@pytest.mark.parametrize("sigma", [0.004, 0.5])
@pytest.mark.parametrize(
    "operator",
    [
        GaussianBlur(0.6),
        Mask(torch.eye(6).bool()) @ GaussianBlur(0.6),
        AveragePool(2),
        Matrix(torch.randn(5, 36, generator=seed(3)) / 6),
    ],
    ids=str,
)
def test_draws_with_a_linear_measurement_are_exact_for_data_of_one_variance(operator, sigma):
    """With Hamiltonian Monte Carlo the means for the blur and the small noise were wrong by seven deviations."""
    prior = Gaussian(torch.full((36,), 3.0), 1.0, (1, 6, 6), schedule=NoiseSchedule.geometric(50, 0.001, 12))
    truth = prior.sample(1, generator=0)
    observation = Observation(operator, operator.measure(truth) + sigma, sigma)
    x = run(DecoupledSampler(prior), 1000, observation=observation, generator=1).double().flatten(1)
    exact = prior.posterior(observation)
    values, vectors = torch.linalg.eigh(exact.covariance)
    along = (x - exact.mean) @ vectors / values.sqrt()
    assert along.mean(0).abs().max() < 4.5 / 1000**0.5
    assert (along.std(0) - 1).abs().max() < 4.5 / 2000**0.5 + (0.001 / sigma) ** 2  # and that of the final denoising


def test_a_linear_measurement_without_noise_is_met():
    blur = GaussianBlur(0.6)
    y = blur.measure(torch.rand(1, 1, 6, 6, generator=seed(0)))
    prior = Gaussian(torch.zeros(36), 1.0, (1, 6, 6), schedule=FEW)
    x = run(DecoupledSampler(prior), 3, observation=Observation(blur, y), generator=0)
    assert (blur.measure(x) - y).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("observed", [False, True])
def test_without_information_draws_are_those_of_the_prior(observed):
    nothing = Observation(Clip(0, 1), torch.tensor([[0.2, 0.9]]), torch.tensor([1e6, torch.inf]))
    x = run(DecoupledSampler(ROUND), 1000, shape=(2,), observation=nothing if observed else None, generator=0)
    assert (x.double().mean(0) - ROUND.mean).abs().max() < 4 / 1000**0.5
    assert (x.std(0) - 1).abs().max() < 4 / 2000**0.5 + 0.01


@pytest.mark.parametrize(
    "sigma", [0.3, torch.tensor([0.2, torch.inf]), lambda v: v @ torch.tensor([[9.0, 4.0], [4.0, 7.0]])]
)
@pytest.mark.parametrize(
    "operator",
    [Clip(0, 1), Linear(lambda x: x @ torch.tensor([[1.0, 0.4], [-0.3, 0.8]])), Mask(torch.tensor([True, True]))],
    ids=str,
)
def test_the_draw_from_the_likelihood_is_exact_with_every_noise(operator, sigma):
    observation = Observation(operator, torch.tensor([[0.9, 0.5]]), sigma).of_shape((2,))
    generator, center = seed(0), torch.tensor([0.7, 0.2]).expand(4000, 2)
    likelihood = Likelihood(observation, 1e6, 0.5)
    likelihood._curvature *= 0  # without the variance that is added at high levels
    x, angle = likelihood.draw(
        center,
        center,
        0.5,
        torch.full((4000,), 0.5),
        20,
        lambda x: torch.randn(x.shape, generator=generator),
        lambda: torch.rand(4000, generator=generator),
    )
    assert angle.min() > 0.1
    prior = -(GRID - center[0]).square().sum(1) / (2 * 0.5**2)
    assert distance(x, grid_posterior(prior, observation)) < 1.63 / 4000**0.5 + 0.01  # Kolmogorov's 1 %, and the grid


@pytest.mark.slow
def test_counts_and_a_measurement_without_noise():
    few = Observation.from_counts(Square(), torch.tensor([[20.0]]), 10.0)
    x = run(DecoupledSampler(TWO), 400, observation=few, generator=0)
    assert distance(x, grid_posterior(TWO.log_density(GRID), few)) < 0.12
    sharp = Observation(Square(), torch.tensor([[2.0]]))
    assert (run(DecoupledSampler(TWO), 50, observation=sharp, generator=0).norm(dim=1) - 2**0.5).abs().max() < 0.1


def test_the_calls_are_counted_and_a_draw_does_not_depend_on_the_others():
    calls = []

    def score(x, sigma):
        calls.append(x.requires_grad)
        return TWO(x, sigma)

    observation = Observation(Clip(0, 1), torch.tensor([[0.5, 1.0], [0.2, 0.3]]), torch.tensor([[0.1], [0.2]]))
    sampler = DecoupledSampler(score, FEW)
    x = run(sampler, shape=(2,), observation=observation, generator=[1, 2])
    assert len(calls) == len(sampler) == 6 and not any(calls)
    assert torch.equal(x, run(sampler, shape=(2,), observation=observation, generator=[1, 2]))
    alone = run(sampler, shape=(2,), observation=observation.rows(slice(1, 2)), generator=[2])
    assert torch.allclose(x[1:], alone, atol=1e-5)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(ValueError, match=r"^DecoupledSampler draws from the likelihood itself: leave out the method"):
        DecoupledSampler(TWO, restore="guide")
    with pytest.raises(ValueError, match=r"^proposals must be an integer of at least 1"):
        DecoupledSampler(TWO, proposals=0)
