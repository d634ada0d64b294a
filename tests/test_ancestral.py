"""Ancestral sampling against Palette's Algorithm 2, and against closed forms on Gaussian data."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.restoration import Mask, Observation
from scorematch.sampling import AncestralSampler, PredictorCorrectorSampler
from scorematch.sampling.ancestral import ancestral_step
from tests.helpers import point, run, seed

SHORT = NoiseSchedule.geometric(5, 0.1, 12)


def nonlinear(y, gamma):
    """A function in place of a network, in Palette's coordinates; it is not the score of a Gaussian."""
    return torch.tanh(y.flip(-1)) * gamma + torch.sin(3 * y) * (1 - gamma)


def palette(betas, f, y, z, *, small=False):
    """Palette's Algorithm 2 as the paper writes it, in Palette's coordinates; the last step adds no noise."""
    alphas = 1 - np.asarray(betas)
    gammas = np.cumprod(alphas)
    for t in reversed(range(len(betas))):
        alpha, gamma = alphas[t], gammas[t]
        mean = (y - (1 - alpha) / math.sqrt(1 - gamma) * f(y, gamma)) / math.sqrt(alpha)
        # "small" is the posterior variance of DDPM; Palette uses 1 - alpha.
        variance = (1 - gammas[t - 1]) / (1 - gamma) * (1 - alpha) if small else 1 - alpha
        y = mean + math.sqrt(variance) * z[t] if t > 0 else mean
    return y


# -- Palette's Algorithm 2


@pytest.mark.parametrize("variance", ["large", "small"])
def test_ancestral_step_equals_palettes_algorithm_2_in_float64(variance, rng):
    """In the units of images in [-1, 1] (k = 1) and of images in [0, 1] (k = 2)."""
    betas = np.linspace(1e-4, 0.09, 100)
    y, z = torch.randn(3, 5, generator=rng).double(), torch.randn(100, 3, 5, generator=rng).double()
    expected = palette(betas, nonlinear, y, z, small=variance == "small")
    for k in (1.0, 2.0):
        sigmas = NoiseSchedule.from_betas(betas).sigmas.tolist()  # those of k = 2
        sigmas = [2 / k * sigma for sigma in sigmas]
        x = y * math.sqrt(1 + (k * sigmas[0]) ** 2) / k
        for t, (sigma, sigma_next) in enumerate(zip(sigmas, [*sigmas[1:], 0.0], strict=True)):
            gamma = 1 / (1 + (k * sigma) ** 2)
            score = -nonlinear(k * x * math.sqrt(gamma), gamma) / sigma
            noise = z[len(sigmas) - 1 - t] if sigma_next else 0 * x  # the last step adds no noise
            x = ancestral_step(x, score, noise, sigma, sigma_next, variance, k)
        assert (k * x - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_sampler_equals_palettes_algorithm_2(variance, rng):
    """For images in [0, 1] and a backbone that predicts the noise, on a schedule like that of Palette's sampling."""
    betas = np.linspace(1e-3, 0.09, 60)

    class Backbone(nn.Module):
        def forward(self, u, step):
            return nonlinear(u, self.gammas[round(float(step[0]))])

    net = ScoreNet(Backbone(), NoiseSchedule.from_betas(betas), precondition="ddpm", sample_shape=(1, 4, 4))
    net.backbone.gammas = np.cumprod(1 - betas)
    y, z = torch.randn(2, 1, 4, 4, generator=rng), torch.randn(60, 2, 1, 4, 4, generator=rng)
    expected = (1 + palette(betas, nonlinear, y.double(), z.double(), small=variance == "small")) / 2
    init = 0.5 + y * math.sqrt(1 + (2 * net.schedule.sigma_max) ** 2) / 2
    recorded = iter(z.flip(0))
    sampler = AncestralSampler(net, variance=variance, clamp=False)
    assert len(sampler) == 60
    found = run(sampler, init=init, noise_source=lambda x: next(recorded))
    assert (found - expected).abs().max() <= 1e-5 * max(1, float(expected.abs().max()))


def test_noise_levels_of_palettes_training_and_sampling_schedules():
    """In [-1, 1] the highest levels are 151 and 1.2e10: 532 of 1,000 sampling levels are above all training levels."""
    schedules = []
    for start, end, steps, low, high in [(1e-6, 0.01, 2000, 0.001, 151), (1e-4, 0.09, 1000, 0.01, 1.23e10)]:
        betas = np.linspace(start, end, steps)
        schedule = NoiseSchedule.from_betas(betas)
        s = 2 * schedule.sigmas.numpy()
        np.testing.assert_allclose(1 / (1 + s**2), np.cumprod(1 - betas)[::-1], rtol=1e-9)  # gamma
        assert len(schedule) == steps
        assert 2 * schedule.sigma_min == pytest.approx(low, rel=0.01)
        assert 2 * schedule.sigma_max == pytest.approx(high, rel=0.01)
        schedules.append(schedule)
    train, sample = schedules
    assert int((sample.sigmas > train.sigma_max).sum()) == 532


# -- The distribution of the samples


def law(world, schedule, variance, mask=None, y=None, noise=0.0):
    """The mean and covariance of the samples for Gaussian data, since every step is affine: x <- M x + b + N z.

    With ``mask``, those of sampling with restore="replace", an observation y and noise of y with this deviation.
    """
    eye = torch.eye(3, dtype=torch.float64)
    mean, covariance = world.mean.double(), world.covariance.double()
    seen = torch.zeros(3, 3, dtype=torch.float64) if mask is None else torch.diag(mask.double())
    y = torch.zeros(3, dtype=torch.float64) if y is None else torch.where(mask, y.double(), 0)
    m, c = torch.zeros(3, dtype=torch.float64), schedule.sigma_max**2 * eye

    def projection(sigma):
        """The matrices of x <- keep x + b + N z, the replacement before the score is computed."""
        if mask is None or sigma < noise:
            return eye, torch.zeros(3, dtype=torch.float64), 0 * eye
        return eye - seen, y, math.sqrt(sigma**2 - noise**2) * seen

    sigmas = list(schedule)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        keep, b, n = projection(sigma)
        drift = sigma**2 - sigma_next**2
        move = eye - drift * torch.linalg.inv(covariance + sigma**2 * eye)
        share = (1 + sigma_next**2) / (1 + sigma**2) if variance == "large" else sigma_next**2 / sigma**2
        keep, b, n = move @ keep, move @ b + (eye - move) @ mean, move @ n
        new = math.sqrt(drift * share) * eye
        # The replacement uses the noise of the step before, the first one that of its own step.
        noises = [n, new] if i else [n + new]
        if i == len(sigmas) - 2:  # the replacement before the denoising uses the noise of the last step
            last, b_last, n_last = projection(sigma_next)
            keep, b, noises = last @ keep, last @ b + b_last, [last @ each for each in noises]
            noises[-1] = noises[-1] + n_last
        m, c = keep @ m + b, keep @ c @ keep.T + sum(each @ each.T for each in noises)
    tweedie = covariance @ torch.linalg.inv(covariance + sigmas[-1] ** 2 * eye)
    m, c = tweedie @ m + (eye - tweedie) @ mean, tweedie @ c @ tweedie.T
    if mask is not None and not noise:
        m, c = (eye - seen) @ m + y, (eye - seen) @ c @ (eye - seen)
    return m, c


def posterior(world, mask, y, noise):
    a = torch.eye(3, dtype=torch.float64)[mask]
    mean, covariance = world.mean.double(), world.covariance.double()
    gain = covariance @ a.T @ torch.linalg.inv(a @ covariance @ a.T + noise**2 * torch.eye(len(a)).double())
    return mean + gain @ (y.double()[mask] - a @ mean), covariance - gain @ a @ covariance


def assert_law(x, m, c):
    """Asserts that every mean and every covariance is within five standard errors."""
    n = len(x)
    x = x.double()
    deviation = c.diag().clamp(min=0).sqrt()
    assert ((x.mean(0) - m).abs() <= 5 * deviation / math.sqrt(n) + 1e-6).all()
    error = (deviation[:, None] ** 2 * deviation**2 + c**2).sqrt() / math.sqrt(n)
    assert ((torch.cov(x.T) - c).abs() <= 5 * error + 1e-6).all()


MASK, Y = torch.tensor([True, False, False]), torch.tensor([[1.2, 0.0, 0.0]])


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("noise", [None, 0.0, 0.3])
@pytest.mark.parametrize("levels", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_samples_of_a_gaussian_have_the_derived_mean_and_covariance(world, variance, noise, levels):
    schedule = NoiseSchedule.geometric(10, 0.02, levels)
    seen = None if noise is None else Observation(Mask(MASK), Y, noise)
    sampler = AncestralSampler(world, schedule, variance=variance, restore="replace")
    x = run(sampler, 8000, shape=(3,), observation=seen, generator=seed(0))
    m, c = law(world, schedule, variance) if noise is None else law(world, schedule, variance, MASK, Y[0], noise)
    assert_law(x, m, c)
    if noise == 0.0:
        assert torch.equal(x[:, 0], Y[:, 0].expand(len(x)))


def test_at_the_noise_level_of_y_the_observed_part_is_y(world):
    """From there the reverse diffusion leads to the posterior."""
    states = {}

    def score(x, sigma):
        states[round(float(sigma), 6)] = x
        return world(x, sigma)

    sampler = AncestralSampler(score, NoiseSchedule([4, 2, 1, 0.3, 0.1]), restore="replace")
    run(sampler, 5, shape=(3,), observation=Observation(Mask(MASK), Y, 0.3), generator=seed(0))
    torch.testing.assert_close(states[0.3][:, 0], Y[:, 0].expand(5))
    assert not torch.allclose(states[1.0][:, 0], Y[:, 0].expand(5))


@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_error_of_the_covariance_is_of_first_order_in_the_step(world, variance):
    """Doubling the number of levels halves the error."""
    errors = []
    for levels in (200, 400, 800):
        m, c = law(world, NoiseSchedule.geometric(30, 1e-3, levels), variance)
        torch.testing.assert_close(m, world.mean.double(), atol=2e-3, rtol=0)
        errors.append(float((c - world.covariance.double()).abs().max()))
    assert errors[-1] < 0.01
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.1)


def test_large_variance_is_exact_for_unit_variance_and_small_for_a_point():
    """Even with nine large steps: "large" for Gaussian data of unit variance, "small" for data at a point."""
    schedule = NoiseSchedule.geometric(1e3, 0.3, 10)
    for variance, deviation in [("large", 1.0), ("small", 0.0)]:

        def score(x, sigma, deviation=deviation):
            return -x / (deviation**2 + sigma**2)

        sampler = AncestralSampler(score, schedule, variance=variance, denoise=False)
        n = 40_000
        x = run(sampler, n, shape=(1,), generator=seed(1))
        expected = deviation**2 + schedule.sigma_min**2
        # The start N(0, sigma_max^2) lacks the variance of the data, which is a millionth of sigma_max^2.
        assert abs(float(x.var()) - expected) < 5 * expected * math.sqrt(2 / n)


def test_large_variance_exceeds_that_of_the_level_for_a_point():
    """By a factor of r^2 + r^-2 - 1, for one step that starts from the exact distribution."""
    r, n = 1.25, 40_000
    schedule = NoiseSchedule([r * 1e-3, 1e-3])
    x = run(
        AncestralSampler(point, schedule, denoise=False),
        init=r * 1e-3 * torch.randn(n, 1, generator=seed(2)),
        generator=seed(3),
    )
    expected = r**2 + r**-2 - 1
    assert abs(float(x.var()) / 1e-6 - expected) < 5 * expected * math.sqrt(2 / n)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_replacement_in_a_descending_chain_is_near_the_posterior(world, noise):
    """The error decreases with more levels. Replacement is not exact: the chain does not mix at each level."""
    expected = posterior(world, MASK, Y[0], noise)
    errors = []
    for levels in (20, 200):
        m, c = law(world, NoiseSchedule.geometric(30, 1e-3, levels), "large", MASK, Y[0], noise)
        errors.append(float((m - expected[0]).abs().max() + (c - expected[1]).abs().max()))
    prior = float((world.mean.double() - expected[0]).abs().max() + (world.covariance - expected[1]).abs().max())
    assert errors[1] < errors[0] < prior / 3


@pytest.mark.parametrize("restore", ["guide", "guide-jacobian"])
def test_guidance_of_a_white_gaussian_follows_the_exact_posterior(restore):
    """Every state equals that of sampling with the score of the posterior, N(y / (1 + n^2), n^2 / (1 + n^2))."""
    noise, schedule = 0.4, NoiseSchedule.geometric(10, 0.05, 30)
    seen = Observation(Mask(MASK), Y, noise)
    mean, variance = torch.where(MASK, Y / (1 + noise**2), 0), torch.where(MASK, noise**2 / (1 + noise**2), 1.0)

    def exact(x, sigma):
        return (mean - x) / (variance + sigma**2)

    guided = AncestralSampler(lambda x, sigma: -x / (1 + sigma**2), schedule, restore=restore)
    found = guided.iterate(50, shape=(3,), observation=seen, generator=seed(0), progress=False)
    expected = AncestralSampler(exact, schedule, restore="replace").iterate(
        50, shape=(3,), generator=seed(0), progress=False
    )
    for (x, _), (correct, _) in zip(found, expected, strict=True):
        torch.testing.assert_close(x, correct, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_modes_of_a_mixture_get_their_weights(mixture):
    n = 4000
    x = run(AncestralSampler(mixture, NoiseSchedule.geometric(10, 0.02, 200)), n, shape=(2,), generator=seed(4))
    upper = x.sum(1) > 0
    assert abs(float(upper.float().mean()) - 0.8) < 5 * math.sqrt(0.16 / n) + 0.005
    assert abs(float(x[upper].std()) / 0.5 - 1) < 0.05


# -- Palette's comparison of losses: the power p


def two_points(share, p):
    """The score that minimizes the loss of power p, for data at 1, with probability ``share``, and at -1.

    For p = 2 the denoised value is the mean of the posterior; for p = 1 it is its median, the likelier of the points.
    """

    def score(x, sigma):
        plus = torch.sigmoid(2 * x / sigma**2 + math.log(share / (1 - share)))
        denoised = 2 * plus - 1 if p == 2 else (2 * plus - 1).sign()
        return (denoised - x) / sigma**2

    return score


@pytest.mark.parametrize(("p", "expected"), [(2, 0.70), (1, 0.79)])
def test_l1_is_less_diverse_than_l2(p, expected):
    sampler = AncestralSampler(two_points(0.7, p), NoiseSchedule.geometric(20, 0.02, 200))
    x = run(sampler, 10_000, shape=(1,), generator=seed(5))
    assert (x.abs() - 1).abs().max() < 0.01
    assert abs(float((x > 0).float().mean()) - expected) < 0.02


# -- Interface


def test_default_schedule_and_repr():
    net = ScoreNet.ncsnv2(1, 8, width=2)
    assert AncestralSampler(net).schedule == net.schedule.respaced(100)
    assert str(AncestralSampler(net)) == "AncestralSampler(100 levels 50 -> 0.01, large variance, 100 network calls)"
    assert AncestralSampler(net, levels=30).schedule == net.schedule.respaced(30)
    assert AncestralSampler(net, net.schedule).schedule == net.schedule
    assert AncestralSampler(net, SHORT, levels=5).schedule == SHORT.respaced(5)
    few = ScoreNet.ncsn(1, 8, width=2)
    assert AncestralSampler(few).schedule == few.schedule
    raw = AncestralSampler(point, SHORT, denoise=False, variance="small")
    assert str(raw) == "AncestralSampler(12 levels 5 -> 0.1, small variance, 11 network calls)"


@pytest.mark.parametrize("levels", [None, 30])
@pytest.mark.parametrize("variance", ["large", "small"])
def test_the_low_levels_of_a_ddpm_leave_no_noise(levels, variance):
    """Respaced to 100 or 30, the last two of 1,000 levels would differ by a factor of 5 or 13: too much noise."""
    std = 0.02

    def score(x, sigma):
        return (0.5 - x) / (std**2 + sigma**2)

    score.schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    score.value_range = (0.0, 1.0)
    sampler = AncestralSampler(score, levels=levels, variance=variance)
    assert len(sampler) == (levels or 100)
    x = run(sampler, 4000, shape=(2,), generator=seed(0))
    # With constant ratios of the levels, the variance of the last state is that of a chain of 100 or 30 steps.
    assert float(x.std()) == pytest.approx(std, rel=0.1 if levels is None else 0.25)
    whole = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    assert AncestralSampler(score, levels=1000).schedule == whole
    assert PredictorCorrectorSampler(score, levels=levels).schedule == (sampler.schedule if levels else whole)


def test_noise_is_taken_once_per_step_before_the_score_and_states_are_yielded(world):
    order = []

    def score(x, sigma):
        order.append(float(sigma))
        return world(x, sigma)

    def noise(x):
        order.append("noise")
        return torch.randn(x.shape, generator=replay)

    replay, init = seed(7), torch.randn(4, 3, generator=seed(6))
    before, state = init.clone(), torch.get_rng_state()
    sampler = AncestralSampler(score, SHORT)
    states, copies = [], []
    for x, sigma in sampler.iterate(init=init, noise_source=noise, progress=False):
        states.append((x, sigma))
        copies.append(x.clone())
    levels = [float(sigma) for sigma in SHORT.sigmas.float()]
    expected = [part for level in levels[:-1] for part in ("noise", level)] + levels[-1:]
    assert order == expected and len(order) == len(SHORT) - 1 + len(sampler)
    assert [sigma for _, sigma in states] == [*list(SHORT)[1:], 0.0]
    assert all(torch.equal(x, copy) for (x, _), copy in zip(states, copies, strict=True))
    assert torch.equal(init, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(states[-1][0], run(AncestralSampler(world, SHORT), init=init, generator=seed(7)))


@pytest.mark.slow
def test_a_batch_equals_its_parts_with_the_same_noise():
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(4, 8), layers_per_block=1, condition_channels=1, schedule=SHORT)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    init, condition = torch.randn(3, 1, 8, 8, generator=seed(1)), torch.rand(3, 1, 8, 8, generator=seed(2))
    noises = [torch.randn(3, 1, 8, 8, generator=seed(10 + i)) for i in range(11)]
    hidden = torch.rand(3, 1, 8, 8, generator=seed(3)) < 0.5
    sampler = AncestralSampler(net, restore="replace")

    def sample(rows):
        own = (z[rows] for z in noises)
        seen = Observation(Mask(~hidden[rows]), condition[rows])
        return run(
            sampler, init=init[rows], condition=condition[rows], observation=seen, noise_source=lambda x: next(own)
        )

    whole = sample(slice(None))
    for i in range(3):
        torch.testing.assert_close(whole[i : i + 1], sample(slice(i, i + 1)), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.where(hidden, 0, whole), torch.where(hidden, 0, condition))


def test_an_observation_of_nothing_changes_nothing(world):
    sampler = AncestralSampler(world, SHORT, restore="replace")
    nothing = Observation(Mask(torch.zeros(3, dtype=torch.bool)), torch.zeros(1, 3))
    plain = run(sampler, 5, shape=(3,), generator=seed(0))
    assert torch.equal(plain, run(sampler, 5, shape=(3,), observation=nothing, generator=seed(0)))


def test_small_variance_equals_the_ancestral_predictor_and_consistent_sampling(world):
    """Equal samples with the ancestral predictor, and with consistent annealed sampling, whose step is 1 - r^2."""
    small = run(AncestralSampler(world, SHORT, variance="small"), 5, shape=(3,), generator=seed(0))
    predictor = PredictorCorrectorSampler(world, SHORT, predictor="ancestral", corrector_steps=0)
    consistent = AnnealedLangevinSampler(world, SHORT, consistent=True)
    for sampler in (predictor, consistent):
        torch.testing.assert_close(run(sampler, 5, shape=(3,), generator=seed(0)), small, rtol=1e-5, atol=1e-5)


def test_a_schedule_of_one_level_gives_one_step_of_tweedies_formula():
    sampler = AncestralSampler(lambda x, sigma: (1 - x) / sigma**2, NoiseSchedule([2.0]))
    assert len(sampler) == 1
    torch.testing.assert_close(run(sampler, 3, shape=(2,), generator=seed(0)), torch.ones(3, 2))


def test_nan_in_the_state_raises_an_error_that_names_the_level():
    with pytest.raises(RuntimeError, match=r"NaN or infinite values from level 6 of 12 on, sigma 0\.5919"):
        run(AncestralSampler(lambda x, sigma: x * math.nan if sigma < 1 else -x, SHORT), 2, shape=(1,))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"variance": "medium"}, ValueError, "variance must be one of 'large', 'small', 'learned', got 'medium'"),
        ({"variance": "learned"}, ValueError, r"needs a network that predicts the variance \(predicts_variance\)"),
        ({"clamp_denoised": True}, ValueError, "clamp_denoised=True needs a network with a value_range"),
        ({"levels": 1}, ValueError, "levels must be an integer of at least 2, got 1"),
        ({"levels": 2.5}, TypeError, "levels must be an integer of at least 2, got 2.5"),
        ({"schedule": None}, ValueError, "no noise levels of its own: pass a schedule"),
        ({"schedule": [1.0, 0.1]}, TypeError, r"got list. Write NoiseSchedule\(sigmas\)"),
        ({"restore": "paste"}, ValueError, "restore must be one of 'auto', 'replace'"),
        ({"net": 3}, TypeError, r"called as net\(x, sigma\), got int"),
    ],
)
def test_invalid_settings_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        AncestralSampler(**{"net": point, "schedule": SHORT, **arguments})
