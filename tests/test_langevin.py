"""Annealed Langevin dynamics: the published trajectories, the distribution of the samples, and arguments."""

import math
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.sampling import AncestralSampler, ODESampler, SamplerSettings
from tests.helpers import point, run, seed

SHORT = NoiseSchedule.geometric(5, 0.1, 12)


# -- The published trajectories, reproduced with their recorded noise


@pytest.mark.parametrize("name", ["ncsn_v1", "ncsnv2_denoise", "ncsnv2_no_denoise"])
def test_published_trajectories_are_reproduced(name, published):
    fixture = published("ald_trajectory")
    mean, deviation = fixture["target"]["mu"], fixture["target"]["s"]
    case = fixture[name]
    recorded = iter(case["noise"])
    denoise = name == "ncsnv2_denoise"
    sampler = AnnealedLangevinSampler(
        lambda x, sigma: -(x - mean) / (deviation**2 + sigma**2),
        NoiseSchedule(case.get("sigmas_float64", case["sigmas"])),
        steps_per_level=case["n_steps_each"],
        step_size=case["step_lr"],
        denoise=denoise,
    )
    states = list(sampler.iterate(init=case["x0"], noise_source=lambda x: next(recorded), progress=False))
    assert next(recorded, None) is None  # once per step
    if name == "ncsn_v1":  # states were recorded before each step; the authors' code does not return the last one
        expected = torch.cat([case["x_before_step"][1:], case["x_after_last_step"][None]])
    else:
        expected = case["returned_images"]
        assert len(sampler) == case["n_score_calls"]
    assert len(states) == len(expected) == len(sampler)
    for (x, _), image in zip(states, expected, strict=True):
        assert (x - image).abs().max() <= 1e-6 * max(1, image.abs().max())
    levels = [sigma for sigma in sampler.schedule for _ in range(case["n_steps_each"])]
    assert [sigma for _, sigma in states] == levels + [0.0] * denoise


def test_published_toy_trajectory_is_reproduced_with_half_the_step_size(published):
    """The toy code of 2019 writes a/2 and sqrt(a); in its score each mode has the standard deviation sigma."""
    case = published("ald_trajectory")["toy_gmm"]
    means, weights = torch.tensor(case["gmm"]["means"]), torch.tensor(case["gmm"]["weights"])

    def score(x, sigma):
        difference = means - x[:, None]
        logits = weights.log() - (difference**2).sum(-1) / (2 * sigma**2)
        return (logits.softmax(1)[..., None] * difference / sigma**2).sum(1)

    recorded = iter(case["annealed"]["noise"])
    schedule = NoiseSchedule(case["sigmas_float64"])
    sampler = AnnealedLangevinSampler(
        score, schedule, steps_per_level=case["annealed"]["n_steps_each"], step_size=case["lr"] / 2, denoise=False
    )
    found = run(sampler, init=case["x0"], noise_source=lambda x: next(recorded))
    torch.testing.assert_close(found, case["annealed"]["x_final"], rtol=1e-4, atol=1e-4)


# -- The distribution of the samples


def _gaussian_chain(variance, schedule, steps, step_size, exact_noise):
    """The variance of the samples for data N(0, variance). Every step is linear, so it follows a scalar recursion."""
    a = step_size / schedule.sigma_min**2  # divided by sigma^2
    v = schedule.sigma_max**2
    for sigma in schedule:
        for _ in range(steps):
            shrink = 1 - a * sigma**2 / (variance + sigma**2)
            v = shrink**2 * v + sigma**2 * (2 * a - a**2 if exact_noise else 2 * a)
    return v * (variance / (variance + schedule.sigma_min**2)) ** 2  # Tweedie's formula


@pytest.mark.parametrize(
    ("levels", "steps", "exact_noise"),
    [
        (40, 3, False),
        (40, 3, True),
        pytest.param(400, 5, True, marks=pytest.mark.slow),
        pytest.param(400, 20, False, marks=pytest.mark.slow),
    ],
)
def test_samples_of_a_gaussian_have_the_derived_mean_and_covariance(world, levels, steps, exact_noise, rng):
    schedule = NoiseSchedule.geometric(10, 0.01, levels)
    sampler = AnnealedLangevinSampler(world, schedule, steps_per_level=steps, exact_noise=exact_noise)
    n = 2000
    x = run(sampler, n, shape=(3,), generator=rng)
    deviations = world.covariance.diag().sqrt()
    assert ((x.mean(0) - world.mean).abs() < 6 * deviations / math.sqrt(n)).all()
    # Along the axes of the covariance the variance of the samples, bias included, is known: five standard errors.
    along = torch.cov((x.double() @ world.vectors).T)
    expected = torch.tensor(
        [_gaussian_chain(float(v), schedule, steps, sampler.step_size, exact_noise) for v in world.values],
        dtype=torch.float64,
    )
    error = (along - expected.diag()).abs()
    assert (error < 5 * math.sqrt(2 / n) * expected.sqrt()[:, None] * expected.sqrt()).all()
    if steps == 20:  # with enough steps the bias is below four percent
        torch.testing.assert_close(expected, world.values, rtol=0.04, atol=0)


@pytest.mark.slow
def test_the_modes_of_a_mixture_get_their_weights(mixture, rng):
    schedule = NoiseSchedule.geometric(10, 0.02, 150)
    n = 2000
    x = run(AnnealedLangevinSampler(mixture, schedule, steps_per_level=12), n, shape=(2,), generator=rng)
    upper = x.sum(1) > 0
    # Five standard errors, and 0.01 for the bias of 4,000 steps.
    assert abs(upper.float().mean() - 0.8) < 5 * math.sqrt(0.16 / n) + 0.01
    assert (x[upper].mean(0) - 1.5).abs().max() < 5 * 0.5 / math.sqrt(0.8 * n)
    assert (x[upper].std(0) / 0.5 - 1).abs().max() < 5 / math.sqrt(2 * 0.8 * n) + 0.02


@pytest.mark.slow
def test_langevin_dynamics_at_one_level_does_not_give_modes_their_weights(mixture, rng):
    """Figure 3 of the 2019 paper: at one low noise level the modes keep the shares of the start."""
    sampler = AnnealedLangevinSampler(mixture, NoiseSchedule([0.1]), steps_per_level=300, step_size=0.005)
    start = torch.rand(4000, 2, generator=rng) * 8 - 4
    x = run(sampler, init=start, generator=rng)
    assert 0.4 < (x.sum(1) > 0).float().mean() < 0.6


@pytest.mark.parametrize(("steps", "a"), [(5, 0.062), (1, 0.2), (3, 0.3)])
def test_variance_after_one_level_is_that_of_technique_4(steps, a, rng):
    """For data at a point, in a chain that starts from the exact distribution at the level before."""
    schedule = NoiseSchedule([0.2, 0.15])
    n = 40_000
    sampler = AnnealedLangevinSampler(
        point, NoiseSchedule([0.15]), steps_per_level=steps, step_size=a * 0.15**2, denoise=False
    )
    start = 0.2 * torch.randn(n, 1, generator=rng)
    found = run(sampler, init=start, generator=rng).var() / 0.15**2
    expected = schedule.level_variance(a * 0.15**2, steps)
    assert abs(found - expected) < 5 * expected * math.sqrt(2 / n)


@pytest.mark.parametrize(
    ("levels", "steps", "a"), [pytest.param(232, 5, 0.062, marks=pytest.mark.slow), (100, 3, 0.2), (300, 1, 0.06)]
)
def test_variance_after_a_whole_schedule_has_its_closed_form(levels, steps, a, rng):
    schedule = NoiseSchedule.geometric(50, 0.01, levels)
    n = 20_000
    sampler = AnnealedLangevinSampler(point, schedule, steps_per_level=steps, step_size=a * 1e-4, denoise=False)
    found = run(sampler, n, shape=(1,), generator=rng).var() / 1e-4
    expected = schedule.chain_variance(a * 1e-4, steps)
    assert abs(found - expected) < 5 * expected * math.sqrt(2 / n)


@pytest.mark.parametrize("a", [0.1, 0.9, 1.7])
def test_exact_noise_keeps_the_variance_for_any_step_size(a, rng):
    n = 40_000
    for exact_noise, expected in [(True, 1.0), (False, 1 / (1 - a / 2))]:
        sampler = AnnealedLangevinSampler(
            point, NoiseSchedule([0.3]), steps_per_level=60, step_size=a * 0.09, exact_noise=exact_noise, denoise=False
        )
        found = run(sampler, n, shape=(1,), generator=rng).var() / 0.09
        assert abs(found - expected) < 5 * expected * math.sqrt(2 / n)


def test_sampling_ends_with_tweedies_formula(rng):
    sampler = AnnealedLangevinSampler(point, SHORT)
    assert run(sampler, 50, shape=(2,), generator=rng).abs().max() < 1e-6  # the mean of the data
    raw = AnnealedLangevinSampler(point, SHORT, denoise=False)
    assert run(raw, 50, shape=(2,), generator=rng).std() > 0.05
    assert len(sampler) == len(raw) + 1


# -- Seeds


@pytest.mark.slow
def test_a_seed_determines_every_bit_and_leaves_the_global_generator_alone(world):
    sampler = AnnealedLangevinSampler(world, SHORT)
    state = torch.get_rng_state()
    first = run(sampler, 4, shape=(3,), generator=seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, run(sampler, 4, shape=(3,), generator=seed(1)))
    assert not torch.equal(first, run(sampler, 4, shape=(3,), generator=seed(2)))
    torch.manual_seed(9)
    second = run(sampler, 4, shape=(3,))
    torch.manual_seed(9)
    assert torch.equal(second, run(sampler, 4, shape=(3,)))


# -- Batches


def test_batch_size_limits_network_calls_and_does_not_change_samples(world):
    seen = []

    def score(x, sigma):
        seen.append(len(x))
        return world(x, sigma)

    sampler = AnnealedLangevinSampler(score, SHORT)
    whole = run(sampler, 10, shape=(3,), generator=seed(0))
    assert seen == [10] * len(sampler)
    seen.clear()
    split = run(sampler, 10, shape=(3,), generator=seed(0), batch_size=4)
    assert seen == [4, 4, 2] * len(sampler)
    torch.testing.assert_close(whole, split, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_default_batches_have_at_most_2_to_the_20_values():
    seen = []

    def score(x, sigma):
        seen.append(len(x))
        return -x

    run(AnnealedLangevinSampler(score, NoiseSchedule([1.0]), steps_per_level=1), 700, shape=(3, 32, 32))
    assert max(seen) == 2**20 // 3072
    seen.clear()
    run(AnnealedLangevinSampler(score, NoiseSchedule([1.0]), steps_per_level=1), 2, shape=(2**21,))
    assert seen[0] == 1


@pytest.mark.slow
def test_a_batch_equals_its_parts_with_the_same_noise(rng):
    torch.manual_seed(0)
    net = ScoreNet.ncsn(1, 8, width=4, schedule=SHORT)
    init = torch.randn(3, 1, 8, 8, generator=rng)
    noises = [torch.randn(3, 1, 8, 8, generator=rng) for _ in range(4)]
    options = {"levels": 4, "steps_per_level": 1, "exact_noise": True, "precision": "float32"}
    sampler = AnnealedLangevinSampler(net, **options)
    together = iter(noises)
    whole = run(sampler, init=init, noise_source=lambda x: next(together))
    for i in range(3):
        own = (z[i : i + 1] for z in noises)
        part = run(sampler, init=init[i : i + 1], noise_source=lambda x, own=own: next(own))
        torch.testing.assert_close(whole[i : i + 1], part, rtol=1e-3, atol=1e-4)


# -- Networks


class Recorder(nn.Module):
    """A backbone that returns zeros and records how it was called."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.inner = nn.Dropout()
        self.calls = []

    def forward(self, x, c_noise, *condition):
        self.calls.append((self.training, self.inner.training, torch.is_grad_enabled(), condition))
        return torch.zeros_like(x) * self.anchor


@pytest.mark.slow
def test_image_sampling_starts_around_one_half_and_ends_in_the_value_range(rng):
    net = ScoreNet(Recorder(), NoiseSchedule.geometric(2, 0.01, 40), sample_shape=(1, 20, 20))
    still = AnnealedLangevinSampler(net, steps_per_level=2, step_size=1e-9)
    first, _ = next(still.iterate(20, generator=rng, progress=False))
    assert abs(first.mean() - 0.5) < 5 * 2 / math.sqrt(8000)
    assert first.std() == pytest.approx(2, rel=0.05)
    images = run(AnnealedLangevinSampler(net), 3, generator=rng)
    assert images.shape == (3, 1, 20, 20) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert run(AnnealedLangevinSampler(net, clamp=False), 50, generator=rng).max() > 1  # N(1/2, 1/16) has tails
    points = ScoreNet(Recorder(), SHORT, sample_shape=(3,), value_range=None)
    assert run(AnnealedLangevinSampler(points), 500, generator=rng).min() < -0.5


def test_network_calls_use_eval_mode_without_gradients_and_modes_are_restored():
    net = ScoreNet(Recorder(), SHORT, sample_shape=(1, 4, 4))
    net.train()
    net.backbone.inner.eval()
    run(AnnealedLangevinSampler(net))
    assert {call[:3] for call in net.backbone.calls} == {(False, False, False)}
    assert net.training and net.backbone.training and not net.backbone.inner.training
    chain = AnnealedLangevinSampler(net).iterate(progress=False)
    x, _ = next(chain)
    assert not x.requires_grad and torch.is_grad_enabled()  # between steps the caller's mode applies
    chain.close()
    assert net.training


def test_the_condition_is_divided_into_batches_like_the_state():
    net = ScoreNet(Recorder(), NoiseSchedule([0.5]), sample_shape=(1, 4, 4))
    sampler = AnnealedLangevinSampler(net, steps_per_level=1)
    assert len(run(sampler, condition=torch.tensor([5, 6, 7]), batch_size=2)) == 3
    assert [call[3][0].tolist() for call in net.backbone.calls] == [[5, 6], [7]] * 2
    net.backbone.calls.clear()
    run(sampler, 2)
    assert net.backbone.calls[0][3] == ()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_networks_of_other_precisions(dtype):
    torch.manual_seed(0)
    net = ScoreNet.ncsnv2(1, 8, width=4, schedule=SHORT, precondition="karras").to(dtype)
    images = run(AnnealedLangevinSampler(net, SHORT), 2, generator=torch.Generator().manual_seed(0))
    assert images.dtype == torch.float32 and torch.isfinite(images).all()


# -- Settings


def test_the_recommended_step_size_is_used_with_the_recommended_schedule_only():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    net.sampler_settings = SamplerSettings(levels=20, steps_per_level=2, step_size=0.003, exact_noise=False)
    sampler = AnnealedLangevinSampler(net)
    assert sampler.schedule == net.schedule.respaced(20)
    assert (sampler.steps_per_level, sampler.step_size, sampler.exact_noise) == (2, 0.003, False)
    assert AnnealedLangevinSampler(net, net.schedule.respaced(20)).step_size == 0.003
    assert AnnealedLangevinSampler(net, steps_per_level=7).steps_per_level == 7
    other = AnnealedLangevinSampler(net, net.schedule)  # the kind of sampling is kept
    assert (other.steps_per_level, other.exact_noise) == (2, False)
    assert other.step_size == net.schedule.suggest_step_size(2)


def test_given_limits_of_the_levels_take_the_place_of_the_recommended_ones():
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(10, 0.1, 40))
    net.sampler_settings = SamplerSettings(levels=20, sigma_max=8)
    for given in ({}, {"sigma_max": 4}, {"sigma_min": 0.2}, {"sigma_max": 9, "sigma_min": 0.2}):
        schedule = AnnealedLangevinSampler(net, **given).schedule
        assert {"sigma_max": schedule.sigma_max, "sigma_min": schedule.sigma_min} == {
            "sigma_max": 8,
            "sigma_min": 0.1,
            **given,
        }
    assert AnnealedLangevinSampler(net, net.schedule).schedule == net.schedule


def test_a_recommended_schedule_is_geometric_if_respacing_leaves_wide_gaps():
    """The 1,000 levels of a DDPM, respaced to 50, would end with two levels whose ratio is eight."""
    schedule = NoiseSchedule.from_betas(np.linspace(1e-4, 0.02, 1000))
    net = ScoreNet.unet(1, 8, widths=(4,), schedule=schedule, precondition="ddpm")
    net.sampler_settings = SamplerSettings(levels=50, consistent=True)
    sampler = AnnealedLangevinSampler(net)
    assert sampler.schedule == NoiseSchedule.geometric(schedule.sigma_max, schedule.sigma_min, 50)
    assert AnnealedLangevinSampler(net, net.schedule, consistent=True).schedule == schedule


@pytest.mark.parametrize("levels", [2, 5, 10, 50, 232, 1086])
def test_default_settings_of_a_callable_are_technique_4_with_bounded_variance(levels):
    schedule = NoiseSchedule.geometric(50, 0.01, levels)
    sampler = AnnealedLangevinSampler(point, schedule)
    steps = sampler.steps_per_level
    assert steps >= 3 and not sampler.exact_noise
    assert sampler.step_size == schedule.suggest_step_size(steps)
    assert schedule.chain_variance(sampler.step_size, steps) <= 1.2
    if steps > 3:  # the smallest number that is enough
        assert schedule.chain_variance(schedule.suggest_step_size(steps - 1), steps - 1) > 1.2


def test_repr_shows_the_settings_and_the_number_of_network_calls():
    sampler = AnnealedLangevinSampler(point, NoiseSchedule.geometric(50, 0.01, 50), steps_per_level=5, step_size=2.2e-5)
    assert str(sampler) == ("AnnealedLangevinSampler(50 levels 50 -> 0.01, 5 steps, step 2.2e-05, 251 network calls)")
    assert len(sampler) == 251
    one = AnnealedLangevinSampler(point, NoiseSchedule([0.5]), steps_per_level=1, exact_noise=True, denoise=False)
    assert str(one) == "AnnealedLangevinSampler(1 level 0.5, 1 step, step 0.025, exact noise, 1 network calls)"


def test_the_progress_bar_can_be_turned_off(capsys):
    sampler = AnnealedLangevinSampler(point, SHORT)
    sampler.sample(1, shape=(1,), progress=False)
    list(sampler.iterate(1, shape=(1,), progress=False))
    assert capsys.readouterr().err == ""
    for sample in (sampler.sample, lambda *n, **shape: list(sampler.iterate(*n, **shape))):
        sample(1, shape=(1,))
        assert f"{len(sampler)}/{len(sampler)}" in capsys.readouterr().err


# -- Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_size": 0.02 + 1e-9}, ValueError, r"stability limit, 2 sigma_min\^2 = 0.02, got 0.02"),
        ({"step_size": 0.5}, ValueError, "stability limit.*got 0.5; technique 4 of NCSNv2 suggests"),
        ({"step_size": 0.0}, ValueError, "between 0 and the stability limit"),
        ({"step_size": float("nan")}, ValueError, "between 0 and the stability limit"),
        ({"steps_per_level": 0}, ValueError, "steps_per_level must be an integer of at least 1, got 0"),
        ({"steps_per_level": 2.5}, TypeError, "an integer of at least 1, got 2.5"),
        ({"precision": "half"}, ValueError, "precision must be one of 'auto', 'float32', got 'half'"),
        ({"schedule": [1.0, 0.1]}, TypeError, r"got list. Write NoiseSchedule\(sigmas\)"),
        ({"schedule": None}, ValueError, "no noise levels of its own: pass a schedule"),
        ({"net": 3}, TypeError, r"called as net\(x, sigma\), got int"),
    ],
)
def test_invalid_settings_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        AnnealedLangevinSampler(**{"net": point, "schedule": SHORT, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "pass shape="),
        ({"n": 2.5, "shape": (1,)}, TypeError, "n must be an integer of at least 1, got 2.5"),
        ({"n": 2, "shape": (1,), "generator": "7"}, TypeError, r"or a seed, got '7'. Write torch.Generator\(\)"),
        ({"n": 2, "shape": (1,), "generator": [0, 0.5]}, TypeError, "or a seed, got 0.5"),
        ({"shape": (1,), "condition": "a"}, TypeError, r"condition must be a tensor, .* got str"),
        ({"init": [0.0]}, TypeError, r"init must be a tensor \(N, ...\), got list"),
        ({"n": 0, "shape": (1,)}, ValueError, "n must be an integer of at least 1, got 0"),
        ({"n": 2, "init": torch.zeros(3, 1)}, ValueError, "2 from n, 3 from init"),
        ({"condition": torch.zeros(2), "init": torch.zeros(3, 1)}, ValueError, "3 from init, 2 from condition"),
        (
            {"shape": (1,), "condition": {"class": torch.zeros(2), "image": torch.zeros(3, 1)}},
            ValueError,
            "2 from condition, 3 from condition",
        ),
        ({"n": 2, "shape": (1,), "generator": [torch.Generator()]}, ValueError, "2 from n, 1 from generator"),
        ({"shape": (2,), "init": torch.zeros(3, 1)}, ValueError, r"shape of one sample of init, \(1,\), got \(2,\)"),
        ({"init": torch.zeros(3, 1).long()}, TypeError, r"init must be floating point.*Write init / 255"),
        (
            {"init": torch.zeros(3, 1) * 1j},
            TypeError,
            r"init must be floating.*Write torch.cat\(\[init.real, init.imag",
        ),
        ({"init": torch.zeros(0, 1)}, ValueError, r"init must be a batch .* at least one sample, got shape \(0, 1\)"),
        ({"shape": (1,), "batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"shape": (1,), "batch_size": 2.5}, TypeError, "batch_size must be an integer of at least 1, got 2.5"),
        ({"n": True, "shape": (1,)}, TypeError, "n must be an integer of at least 1, got True"),
        ({"shape": 4}, TypeError, r"shape must be the shape of one sample, .* positive integers, got 4"),
        ({"shape": (-4,)}, ValueError, r"shape must be the shape of one sample, .* positive integers, got \(-4,\)"),
        ({"init": torch.tensor(4.0)}, ValueError, r"init must be a batch \(N, ...\) .*, got shape \(\)"),
        ({"init": torch.tensor([[math.nan]])}, ValueError, "init must be finite, got NaN or infinite values"),
    ],
)
def test_invalid_arguments_raise_before_the_first_step(arguments, error, message):
    sampler = AnnealedLangevinSampler(point, SHORT)
    with pytest.raises(error, match=message):
        run(sampler, **arguments)
    with pytest.raises(error, match=message):
        sampler.iterate(**arguments)


def test_integers_of_numpy_and_of_torch(world):
    def score(x, sigma, condition):
        assert torch.equal(condition, torch.full((3,), 5))
        return world(x, sigma)

    sampler = ODESampler(score, SHORT)
    for n, condition in ((3, 5), (np.int64(3), np.int64(5)), (3, torch.tensor(5)), (3, torch.full((3,), 5))):
        assert run(sampler, n, shape=(3,), condition=condition).shape == (3, 3)


def test_noise_of_another_shape_raises(world):
    with pytest.raises(ValueError, match=r"noise must have the shape of x, \(2, 3\), got \(2, 1\)"):
        run(AnnealedLangevinSampler(world, SHORT), 2, shape=(3,), noise_source=lambda x: torch.zeros(2, 1))
    with pytest.raises(TypeError, match="noise_source must return a tensor, got ndarray"):
        run(AnnealedLangevinSampler(world, SHORT), 2, shape=(3,), noise_source=lambda x: np.zeros(x.shape))


def test_the_memory_of_a_run_does_not_grow_with_the_number_of_levels():
    levels = []

    def score(x, sigma):
        levels.append(weakref.ref(sigma))
        assert len({id(level()) for level in levels} - {id(None)}) <= 2
        return -x

    run(AnnealedLangevinSampler(score, SHORT), 2, shape=(3,))
    assert len(levels) > len(SHORT)


@pytest.mark.parametrize("kind", [AnnealedLangevinSampler, ODESampler, AncestralSampler])
def test_a_network_with_one_noise_level(kind):
    """One level is the default, and another number is an error."""
    net = ScoreNet.unet(1, 8, widths=(4,), schedule=NoiseSchedule([0.5]))
    sampler = kind(net)
    assert len(sampler.schedule) == 1
    assert sampler.sample(2, generator=0, progress=False).shape == (2, 1, 8, 8)
    assert len(kind(net, levels=1)) == len(sampler)
    assert len(kind(net, restore="auto")) == len(sampler)
    with pytest.raises(ValueError, match="levels must be 1 for a schedule of one level, got 5"):
        kind(net, levels=5)


@pytest.mark.parametrize("precision", ["auto", pytest.param("float32", marks=pytest.mark.slow)])
def test_samples_are_the_same_under_autocast(precision):
    net = ScoreNet.unet(1, 8, widths=(4,), schedule=SHORT)
    torch.nn.init.normal_(net.backbone.conv_out.weight)
    sampler = AnnealedLangevinSampler(net, steps_per_level=2, precision=precision)
    expected = sampler.sample(2, generator=0, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sampler.sample(2, generator=0, progress=False), expected)


@pytest.mark.parametrize("denoise", [True, False])
def test_nan_in_the_state_raises_an_error_that_names_the_level(denoise):
    calls = []

    def score(x, sigma):
        calls.append(float(sigma))
        return x * math.nan if sigma < 1 else -x

    sampler = AnnealedLangevinSampler(score, SHORT, steps_per_level=8, denoise=denoise)
    with pytest.raises(
        RuntimeError,
        match=r"NaN or infinite values from level 5 of 12 on, sigma 0\.8447, after the step from sigma 1\.",
    ):
        run(sampler, 2, shape=(1,))
    assert 41 <= len(calls) <= 56  # the state is checked every 16 steps
    calls.clear()
    states = sampler.iterate(2, shape=(1,), progress=False)
    with pytest.raises(RuntimeError, match="from level 5 of 12 on"):
        for _ in states:
            pass
