"""Multistep methods: orders of convergence, laws of the noise, and the schedulers of diffusers on the same levels."""

import itertools
import math
import warnings

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.evaluation.exact import Gaussian
from scorematch.restoration import Mask, Observation
from scorematch.sampling import AncestralSampler, ODESampler
from scorematch.sampling.multistep import METHODS, multistep, plan
from tests.helpers import point, run, seed

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import DPMSolverMultistepScheduler, IPNDMScheduler, SASolverScheduler, UniPCMultistepScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of diffusers with NumPy 2
LEVELS = NoiseSchedule.karras(20, 0.05, 9)
EVERY = [(name, order) for name, method in METHODS.items() for order in range(1, method.highest + 1)]
every_method = pytest.mark.parametrize(("method", "order"), EVERY)


# -- Orders -----------------------------------------------------------------------------------------------------------


def _solved(score, steps, name, order, x):
    """The end of the flow in float64."""
    method, levels = METHODS[name], list(NoiseSchedule.geometric(100, 0.5, steps + 1))

    def chain(x, sigma):
        return x, score(x, torch.tensor(sigma, dtype=torch.float64)), None

    *_, (x, _) = multistep(x, chain, plan(method, levels, order, [0.0] * steps), noise=method.noise)
    return x


@pytest.mark.parametrize("kind", ["gaussian", pytest.param("mixture", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("method", "order"),
    [pair if pair[1] == METHODS[pair[0]].order else pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY],
)
def test_the_error_falls_with_the_order(world, mixture, method, order, kind, rng):
    """The correction of UniPC raises the order by one; the last step limits it. The first steps add little error."""
    score = world if kind == "gaussian" else mixture
    init = 100 * torch.randn(50, 3 if kind == "gaussian" else 2, generator=rng, dtype=torch.float64)
    if kind == "mixture":
        exact = _solved(score, 1000, "unipc", 3, init)
    else:
        v, along = world.values.double(), (init - world.mean) @ world.vectors.double()
        exact = along * ((v + 0.5**2) / (v + 100**2)).sqrt() @ world.vectors.double().T + world.mean
    errors = [
        float((_solved(score, steps, method, order, init) - exact).square().mean().sqrt()) for steps in (128, 256)
    ]
    expected = min(order + METHODS[method].corrected, METHODS[method].last + 1)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(expected, abs=0.45)


@pytest.mark.parametrize("method", ["dpm-solver++", "ipndm"])
def test_order_one_is_euler_and_ddim(mixture, method):
    init = 20 * torch.randn(50, 2, generator=seed(0))
    x = init
    for sigma, sigma_next in itertools.pairwise(LEVELS):
        x = x + (sigma - sigma_next) * sigma * mixture(x, torch.tensor(sigma))
    found = run(ODESampler(mixture, LEVELS, method=method, order=1, denoise=False), init=init)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_short_step_does_not_amplify_rounding_errors(name, mixture):
    """Two levels that differ by 1e-6 change the result as little as one of them does."""
    init = 20 * torch.randn(50, 2, generator=seed(0))
    sigmas = list(LEVELS)
    results = []
    for levels in (sigmas, [*sigmas[:4], sigmas[3] * (1 - 1e-6), *sigmas[4:]]):
        sampler = ODESampler(mixture, NoiseSchedule(levels), method=name, order=METHODS[name].highest)
        results.append(run(sampler, init=init))
    assert (results[0] - results[1]).abs().max() < 0.4
    steps = plan(METHODS[name], levels, METHODS[name].highest, [0.0] * (len(levels) - 1))
    assert max(abs(weight) * (1 - step.kept) for step in steps for weight in step.weights) < 5


# -- Noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "order"), [each for each in EVERY if each[0] != "ipndm"])
@pytest.mark.parametrize("eta", [0.3, 1.0, [0, 2, 0, 10, 0.5]])
def test_noise_leaves_every_level_its_variance(method, order, eta):
    """For data at one point, with any amount of noise; to five standard errors."""
    sampler = ODESampler(
        point, NoiseSchedule([4.0, 3.0, 1.6, 1.1, 0.5, 0.4]), method=method, order=order, eta=eta, denoise=False
    )
    n = 20_000
    for x, sigma in sampler.iterate(n, shape=(1,), generator=0, progress=False):
        assert abs(float(x.var()) / sigma**2 - 1) < 5 * math.sqrt(2 / n)


def test_order_one_with_noise_is_ancestral_sampling(mixture):
    init, zs = 20 * torch.randn(50, 2, generator=seed(0)), torch.randn(9, 50, 2, generator=seed(1))
    first, second = iter(zs), iter(zs)
    found = run(
        ODESampler(mixture, LEVELS, method="dpm-solver++", order=1, eta=1),
        init=init,
        noise_source=lambda x: next(first),
    )
    small = AncestralSampler(mixture, LEVELS, variance="small")
    expected = run(small, init=init, noise_source=lambda x: next(second))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_noise_is_drawn_without_eta(world):
    sampler = ODESampler(world, LEVELS, method="unipc", eta=[0.0] * 8)
    assert not sampler.draws_noise and str(sampler).endswith("unipc, 9 network calls)")
    noisy = ODESampler(world, LEVELS, method="unipc", order=3, eta=0.5)
    assert noisy.draws_noise and str(noisy).endswith("unipc, order 3, eta 0.5, 9 network calls)")


@pytest.mark.parametrize(("name", "eta"), [("dpm-solver++", 1), ("unipc", 0.5), *((name, None) for name in METHODS)])
def test_restoration_of_a_gaussian(name, eta):
    """Guidance is exact for the variance 1; to five standard errors, and the error of the steps."""
    levels = NoiseSchedule.geometric(50, 0.01, 40)
    world = Gaussian([0.5, -0.2], [[1.0, 0.0], [0.0, 1.0]], schedule=levels)
    observation = Observation(Mask(torch.tensor([True, False])), torch.tensor([[1.5, 0.0]]), 0.5)
    posterior, n = world.posterior(observation), 4000
    sampler = ODESampler(world, levels, method=name, eta=eta, restore="guide")
    x = run(sampler, n, observation=observation, generator=0).double()
    deviation = posterior.covariance.diagonal().sqrt()
    assert ((x.mean(0) - posterior.mean) / deviation).abs().max() < 5 / math.sqrt(n) + 0.02
    torch.testing.assert_close(x.std(0), deviation, rtol=5 / math.sqrt(2 * n) + 0.02, atol=0)


# -- Diffusers --------------------------------------------------------------------------------------------------------


def _diffusers(scheduler, score, sigmas, x, noises=None):
    """The states of a scheduler of diffusers, which scales them by 1 / sqrt(1 + sigma^2), in the units of x."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    scheduler.timesteps = torch.arange(len(sigmas) - 1)
    states, x = [], x.double()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        denoised = x + sigma**2 * score(x, torch.tensor(sigma, dtype=torch.float64))
        noise = {} if noises is None else {"variance_noise": noises[i].double()}
        y = scheduler.step(denoised, scheduler.timesteps[i], x / math.sqrt(1 + sigma**2), **noise).prev_sample
        x = y * math.sqrt(1 + sigma_next**2)
        states.append(x)
    return states


@pytest.mark.parametrize(
    ("kind", "method", "order", "options"),
    [
        *((UniPCMultistepScheduler, "unipc", order, {}) for order in (1, 2, 3)),
        (DPMSolverMultistepScheduler, "dpm-solver++", 1, {}),
        (DPMSolverMultistepScheduler, "dpm-solver++", 2, {"solver_type": "midpoint"}),
        # Its own third order divides the second difference by two; that of UniPC without a corrector does not.
        (UniPCMultistepScheduler, "dpm-solver++", 3, {"disable_corrector": list(range(20))}),
    ],
)
def test_schedulers_of_diffusers_take_the_same_steps(mixture, kind, method, order, options):
    init = 20 * torch.randn(20, 2, generator=seed(0))
    scheduler = kind(prediction_type="sample", solver_order=order, final_sigmas_type="zero", **options)
    theirs = _diffusers(scheduler, mixture, [*LEVELS, 0.0], init)
    ours = list(ODESampler(mixture, LEVELS, method=method, order=order).iterate(init=init, progress=False))
    for (x, _), expected in zip(ours, theirs, strict=True):
        # A state of UniPC is corrected after the next call, also here: only the last one can be compared.
        if method != "unipc" or x is ours[-1][0]:
            torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_stochastic_scheduler_of_diffusers_takes_the_same_steps(mixture):
    init, zs = 20 * torch.randn(20, 2, generator=seed(0)), torch.randn(9, 20, 2, generator=seed(1))
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="sample", solver_order=2, algorithm_type="sde-dpmsolver++", final_sigmas_type="zero"
    )
    theirs = _diffusers(scheduler, mixture, [*LEVELS, 0.0], init, zs)
    noises = iter(zs)
    sampler = ODESampler(mixture, LEVELS, method="dpm-solver++", eta=1)
    ours = list(sampler.iterate(init=init, noise_source=lambda x: next(noises), progress=False))
    for (x, _), expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_scheduler_ipndm_of_diffusers_takes_the_same_steps_at_equal_distances(mixture):
    """Its coefficients are those of equal steps."""
    levels, init = NoiseSchedule.karras(20, 2, 10, rho=1), 20 * torch.randn(20, 2, generator=seed(0))
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(9)
    sigmas = levels.sigmas
    scheduler.alphas, scheduler.betas = (1 + sigmas**2).rsqrt(), sigmas * (1 + sigmas**2).rsqrt()
    x = init.double()
    ours = ODESampler(mixture, levels, method="ipndm", denoise=False).iterate(init=init, progress=False)
    for i, (found, _) in enumerate(ours):
        noise = -sigmas[i] * mixture(x, sigmas[i])
        alpha, beta = scheduler.alphas[i], scheduler.betas[i]
        output = (noise - alpha * x * beta) / alpha
        x = scheduler.step(output, scheduler.timesteps[i], alpha * x).prev_sample / scheduler.alphas[i + 1]
        torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
def test_the_weights_of_sa_solver_in_diffusers_are_equal(tau):
    """Its coefficients of third order; those of second order have an extra term. eta is tau^2."""
    sigmas, eta = [3.0, 2.0, 1.0, 0.6], tau**2
    step = list(plan(METHODS["dpm-solver++"], [*sigmas, 0.5], 3, [eta] * 4))[2]
    places = [-math.log(sigma) for sigma in sigmas]
    end = places[3]
    found = SASolverScheduler().get_coefficients_fn(
        3, *(torch.tensor(place, dtype=torch.float64) for place in (places[2], end)), places[2::-1], tau
    )
    scale = (1 + eta) * sigmas[3] * math.exp(-eta * end) / (1 - step.kept)
    assert step.weights == pytest.approx([float(scale * each) for each in found[1:]], rel=1e-9)
