"""Noise schedules: the published numbers, the techniques of NCSNv2, and the schedule as a value."""

import copy
import json
import math
import pickle
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from scorematch import AnnealedLangevinSampler, NoiseSchedule
from scorematch.evaluation.exact import GaussianMixture
from tests.helpers import NoFloat64, run, seed

schedules = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=30, unique=True).map(
    # Levels that differ by less than 1e-5 of their value can be equal in float32.
    lambda values: NoiseSchedule(_distinct(sorted(values, reverse=True)))
)


def _distinct(values):
    kept = values[:1]
    for value in values[1:]:
        if value < kept[-1] * (1 - 1e-5):
            kept.append(value)
    return kept


# -- The published numbers


@pytest.mark.parametrize(
    ("sigma_max", "levels", "steps", "step_size"),
    [(50, 232, 5, 6.2e-6), (90, 500, 5, 3.3e-6), (190, 1086, 3, 1.8e-6), (348, 2311, 3, 0.9e-6)],
)
def test_technique_4_gives_the_published_step_sizes(sigma_max, levels, steps, step_size):
    found = NoiseSchedule.geometric(sigma_max, 0.01, levels).suggest_step_size(steps)
    assert found == pytest.approx(step_size, abs=0.051e-6)  # the published table has two digits


@pytest.mark.parametrize(
    ("sigma_max", "pixels", "half", "published"),
    [(50, 32, 219, 232), (90, 64, 472, 500), (140, 96, 745, 788), (190, 128, 1026, 1086), (348, 256, 2182, 2311)],
)
def test_technique_2_gives_the_published_numbers_of_levels(sigma_max, pixels, half, published):
    dimension = 3 * pixels**2
    assert NoiseSchedule.suggest_levels(sigma_max, 0.01, dimension) == half
    assert NoiseSchedule.suggest_levels(sigma_max, 0.01, dimension, C=0.567) == pytest.approx(published, abs=1)


def test_published_settings_have_the_documented_variances():
    cifar = NoiseSchedule.geometric(50, 0.01, 232)
    assert cifar.chain_variance(6.2e-6, 5) == pytest.approx(1.13, abs=0.005)
    assert NoiseSchedule.geometric(1, 0.01, 10).chain_variance(2e-5, 100) == pytest.approx(1.111, abs=0.001)


# -- Technique 4 and the variances


@pytest.mark.slow
@given(levels=st.integers(2, 400), sigma_max=st.floats(0.1, 400), steps=st.integers(1, 200), steer=st.floats(-0.5, 0.5))
@settings(deadline=None)
def test_technique_4_minimizes_the_variance_after_a_level(levels, sigma_max, steps, steer):
    schedule = NoiseSchedule.geometric(sigma_max, 0.01, levels)
    best = schedule.suggest_step_size(steps)
    other = min(best * math.exp(steer), 1.9e-4)
    assert schedule.level_variance(best, steps) <= schedule.level_variance(other, steps) * (1 + 1e-9)


def test_technique_4_has_its_closed_form_for_one_step_per_level():
    schedule = NoiseSchedule.geometric(50, 0.01, 100)
    gamma = schedule[0] / schedule[1]
    assert schedule.suggest_step_size(1) == pytest.approx(1e-4 * (1 - gamma**-2), rel=1e-6)
    # With one step per level the variance at the end is always twice that of the level.
    assert schedule.chain_variance(schedule.suggest_step_size(1), 1) == pytest.approx(2)


@pytest.mark.parametrize(("levels", "steps", "a"), [(232, 5, 0.062), (50, 3, 0.3), (20, 10, 1.2), (700, 1, 0.05)])
def test_level_and_chain_variance_follow_their_recursion(levels, steps, a):
    schedule = NoiseSchedule.geometric(50, 0.01, levels)
    gamma2 = (schedule[0] / schedule[1]) ** 2

    def descend(v):  # one level, for data at a point: x <- (1 - a) x + sqrt(2 a) sigma z
        for _ in range(steps):
            v = (1 - a) ** 2 * v + 2 * a
        return v

    assert schedule.level_variance(a * 1e-4, steps) == pytest.approx(descend(gamma2))
    v = 1.0
    for _ in range(5000):
        v = descend(v * gamma2)
    assert schedule.chain_variance(a * 1e-4, steps) == pytest.approx(v)


def test_chain_variance_is_infinite_if_steps_are_too_small_for_the_schedule():
    assert NoiseSchedule.geometric(50, 0.01, 10).chain_variance(1e-6, 1) == math.inf


def test_suggested_step_size_for_one_level_is_a_tenth_of_sigma_squared():
    assert NoiseSchedule([0.2]).suggest_step_size(7) == pytest.approx(0.1 * 0.04)


def test_step_size_of_an_uneven_schedule_is_that_of_the_geometric_one():
    uneven = NoiseSchedule([50, 1, 0.5, 0.01])
    assert uneven.suggest_step_size(5) == NoiseSchedule.geometric(50, 0.01, 4).suggest_step_size(5)


# -- The schedule as a value


def test_geometric_has_exact_ends_and_a_constant_ratio():
    schedule = NoiseSchedule.geometric(50, 0.01, 232)
    assert (schedule.sigma_max, schedule.sigma_min, len(schedule)) == (50, 0.01, 232)
    ratios = schedule.sigmas[1:] / schedule.sigmas[:-1]
    assert torch.allclose(ratios, ratios[:1], rtol=1e-12, atol=0)
    assert schedule.sigmas.dtype == torch.float64


def test_from_betas_gives_the_levels_of_a_ddpm_for_images_in_0_1():
    betas = np.linspace(1e-4, 0.02, 1000)
    schedule = NoiseSchedule.from_betas(torch.from_numpy(betas))
    alpha_bar = np.cumprod(1 - betas)
    expected = 0.5 * np.sqrt(1 / alpha_bar - 1)
    np.testing.assert_allclose(schedule.sigmas.numpy(), expected[::-1], rtol=1e-10)
    assert schedule.sigma_min == pytest.approx(0.005, rel=1e-3)


def test_equality_hash_repr_copies_and_immutability(tmp_path):
    a = NoiseSchedule([1.0, 0.5, 0.1])
    assert (
        a
        == NoiseSchedule(np.array([1.0, 0.5, 0.1]))
        == NoiseSchedule(torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    )
    assert a != NoiseSchedule([1.0, 0.5]) and a != 3
    assert len({a, NoiseSchedule([1.0, 0.5, 0.1])}) == 1
    assert repr(a) == "NoiseSchedule(3 levels, 1 -> 0.1)"
    assert repr(NoiseSchedule([0.25])) == "NoiseSchedule(1 level, 0.25)"
    with pytest.raises(AttributeError, match="cannot assign to field 'sigma_max'"):
        a.sigma_max = 3
    with pytest.raises(AttributeError, match="cannot delete field '_values'"):
        del a._values
    a.sigmas[0] = 7  # a copy
    assert a.sigma_max == 1.0
    assert (a[0], a[-1], list(a)) == (1.0, 0.1, [1.0, 0.5, 0.1])
    a.position(torch.tensor(0.3))  # stores a table in the object, which does not affect equality
    assert copy.deepcopy(a) == copy.copy(a) == a == pickle.loads(pickle.dumps(a))  # noqa: S301
    assert hash(copy.deepcopy(a)) == hash(a) == hash(NoiseSchedule([1.0, 0.5, 0.1]))


def test_tensors_without_values_are_not_kept():
    schedule = NoiseSchedule([1.0, 0.5, 0.1])
    with FakeTensorMode():  # as in torch.export
        schedule.position(torch.ones(2))
    assert schedule.position(torch.tensor([0.5, 0.1])).tolist() == [1, 2]


@given(schedules)
@settings(deadline=None)
def test_json_restores_a_schedule_exactly(schedule):
    assert NoiseSchedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.slow
@given(schedules, st.integers(2, 50))
@settings(deadline=None)
def test_respacing_keeps_the_range_and_is_even_in_position(schedule, levels):
    if len(schedule) == 1:
        with pytest.raises(ValueError, match=f"must be 1 for a schedule of one level, got {levels}"):
            schedule.respaced(levels)
        return
    respaced = schedule.respaced(levels)
    assert (respaced.sigma_max, respaced.sigma_min, len(respaced)) == (schedule.sigma_max, schedule.sigma_min, levels)
    positions = schedule.position(respaced.sigmas)
    expected = torch.linspace(0, len(schedule) - 1, levels, dtype=torch.float64)
    assert torch.allclose(positions, expected, atol=1e-6 * len(schedule))
    assert schedule.respaced(len(schedule)) == schedule


@given(schedules, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
@settings(deadline=None, max_examples=30)
def test_a_range_has_its_ends_and_the_levels_between_them(schedule, a, b):
    assert schedule.between() is schedule is schedule.between(schedule.sigma_max)
    if len(schedule) == 1 or a == b:
        return
    low, high = (schedule.sigma_min ** (1 - share) * schedule.sigma_max**share for share in sorted((a, b)))
    if not schedule.sigma_min < low < high < schedule.sigma_max:  # rounded to the same number
        return
    found = schedule.between(high, low)
    assert (found.sigma_max, found.sigma_min) == (high, low)
    assert set(found) - {high, low} == {sigma for sigma in schedule if low < sigma < high}
    assert schedule.between(sigma_max=high).between(sigma_min=low) == found


def test_an_end_of_a_range_may_be_rounded_to_float32():
    schedule = NoiseSchedule([0.1, 0.05, 0.01])
    high, low = float(np.float32(0.1)), float(np.float32(0.01))
    assert high > schedule.sigma_max and low < schedule.sigma_min
    assert schedule.between(high, low) is schedule


@pytest.mark.slow
@given(schedules, st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None)
def test_the_position_of_a_level_is_its_index(schedule, dtype):
    expected = torch.arange(len(schedule), dtype=dtype)
    assert torch.equal(schedule.position(schedule.sigmas.to(dtype)), expected)


def test_position_is_linear_in_log_sigma_and_clamped():
    schedule = NoiseSchedule([10.0, 1.0, 0.5])
    sigma = torch.tensor([[100.0, 10**0.5], [0.5**0.5, 0.1]])
    torch.testing.assert_close(schedule.position(sigma), torch.tensor([[0.0, 0.5], [1.5, 2.0]]))
    assert schedule.position(1.0) == 1 and schedule.position(1.0).shape == ()
    assert schedule.position(torch.tensor([0.7]).half()).dtype == torch.float32
    just_beyond = torch.tensor(0.5).nextafter(torch.tensor(0.0))
    assert schedule.position(just_beyond) == 2
    assert torch.equal(NoiseSchedule([0.3]).position(torch.tensor([0.1, 5.0])), torch.zeros(2))


@pytest.mark.parametrize("equal", [0, 1])
def test_positions_are_finite_if_two_levels_are_equal_in_float32(equal):
    sigmas = [10.0, 1.0, 0.5]
    schedule = NoiseSchedule([*sigmas[: equal + 2], sigmas[equal + 1] * (1 - 1e-9), *sigmas[equal + 2 :]])
    found = schedule.position(torch.tensor([20.0, 10.0, 1.0, 0.5, 0.1]))
    expected = torch.tensor([0.0, 0.0, 2.0, 3.0, 3.0]) if equal == 0 else torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0])
    assert torch.equal(found, expected)


def test_position_of_a_strided_tensor():
    schedule = NoiseSchedule([10.0, 1.0, 0.5])
    assert torch.equal(schedule.position(torch.tensor([10.0, 9.0, 1.0, 9.0])[::2]), torch.tensor([0.0, 1.0]))


def test_no_float64_reaches_a_device():
    schedule = NoiseSchedule([10.0, 1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    with NoFloat64():
        assert schedule.sample(3, generator=generator, device="meta").device.type == "meta"
        for dtype in (torch.float32, torch.float16):
            sigma = torch.empty(3, dtype=dtype, device="meta")
            assert schedule.position(sigma).dtype == torch.float32
        assert schedule.position(0.7).device.type == "cpu"
        with pytest.raises(TypeError, match="float64 tensor on meta"):  # the check can fail
            schedule.sigmas.to("meta")


# -- Training noise


def test_training_levels_are_uniform_and_reproducible(rng):
    schedule = NoiseSchedule([4.0, 2.0, 1.0, 0.5])
    state = torch.get_rng_state()
    drawn = schedule.sample(40_000, generator=rng)
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.dtype == torch.float32 and drawn.shape == (40_000,)
    for sigma in schedule:  # binomial with probability 1/4: five standard errors of 0.0022
        assert abs((drawn == sigma).float().mean() - 0.25) < 0.011
    assert torch.equal(drawn, schedule.sample(40_000, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(drawn, schedule.sample(40_000, generator=0))  # an int is a seed
    torch.manual_seed(5)
    first = schedule.sample(10)
    torch.manual_seed(5)
    assert torch.equal(first, schedule.sample(10))


# -- Technique 1


def test_from_data_takes_the_largest_distance(rng):
    images = torch.rand(300, 3, 32, 32, generator=rng) * 0.1
    images[17] = 0.0
    images[250] = 50 / math.sqrt(3 * 32 * 32)
    schedule = NoiseSchedule.from_data(images, 0.01)
    assert schedule.sigma_max == pytest.approx(50, rel=1e-6)
    assert len(schedule) == 219
    assert len(NoiseSchedule.from_data(images.numpy(), 0.01, C=0.567)) == 232


def test_from_data_takes_arrays_of_any_layout(rng):
    images = torch.rand(6, 4, 4, 3, generator=rng).numpy()
    expected = NoiseSchedule.from_data(images.copy())
    for other in (images[..., ::-1], images[::-1], images.astype(">f4"), images.astype(">f8")[:, ::-1]):
        assert NoiseSchedule.from_data(other).sigma_max == pytest.approx(expected.sigma_max)


def test_from_data_compares_images_of_different_blocks(rng, monkeypatch):
    monkeypatch.setattr("scorematch.noise._DISTANCE_BLOCK", 7)
    points = torch.randn(40, 5, generator=rng)
    expected = max(float((a - b).norm()) for a in points.double() for b in points.double())
    assert NoiseSchedule.from_data(points).sigma_max == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("offset", "dtype"), [(1e5, torch.float32), (1e9, torch.float64)])
def test_from_data_of_points_far_from_zero(offset, dtype, rng):
    points = torch.randn(500, 2, generator=rng).to(dtype) + offset
    expected = float(torch.pdist(points.double() - offset).max())
    assert NoiseSchedule.from_data(points).sigma_max == pytest.approx(expected, rel=1e-6)


def test_from_data_compares_a_random_subset_of_many_images(rng):
    points = torch.randn(500, 3, generator=rng)
    subset = [NoiseSchedule.from_data(points, max_images=20, generator=source) for source in (seed(1), 1, 2)]
    assert subset[0] == subset[1] != subset[2]
    assert subset[0].sigma_max <= NoiseSchedule.from_data(points).sigma_max


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.linspace(-1, 1, 96).view(2, 3, 4, 4), r"got values from -1 to 1. Write \(images \+ 1\) / 2"),
        (torch.linspace(0, 255, 96).view(2, 3, 4, 4), "got values from 0 to 255.*images / 255.*value_range=None"),
    ],
)
def test_images_in_other_units_raise(images, message):
    with pytest.raises(ValueError, match=r"must have values in \[0, 1\], " + message):
        NoiseSchedule.from_data(images)
    own = (float(images.min()), float(images.max()))
    assert NoiseSchedule.from_data(images, value_range=own) == NoiseSchedule.from_data(images, value_range=None)
    assert NoiseSchedule.from_data(images.flatten(1)).sigma_max > 1  # data that are not images have no range
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        NoiseSchedule.from_data(images.flatten(1), value_range=(0, 1))


def test_levels_are_floats_of_python():
    for sigmas in ([2, 1], np.array([2.0, 1.0], np.float32), torch.tensor([2.0, 1.0])):
        assert [type(sigma) for sigma in NoiseSchedule(sigmas)] == [float, float]


def test_levels_of_images_that_are_differentiated(rng):
    images = torch.rand(5, 1, 4, 4, generator=rng)
    assert NoiseSchedule.from_data(images.clone().requires_grad_()) == NoiseSchedule.from_data(images)


def test_images_that_overshoot_a_little_are_accepted(rng):
    images = torch.rand(20, 3, 8, 8, generator=rng) * 1.15 - 0.075  # as after a bicubic resize
    assert NoiseSchedule.from_data(images).sigma_max > 1


def test_nan_outside_of_the_random_subset_raises(rng):
    images = torch.rand(50, 1, 4, 4, generator=rng)
    images[49, 0, 0, 0] = math.nan
    for _ in range(3):
        with pytest.raises(ValueError, match="NaN or infinity"):
            NoiseSchedule.from_data(images, max_images=2, generator=rng)


@pytest.mark.parametrize("dimension", [784, 3072])
@pytest.mark.parametrize("overlap", [0.2, 0.5, 0.995])
def test_the_overlap_of_neighboring_levels_is_that_of_technique_2(dimension, overlap):
    """Phi(s + 3 gamma) - Phi(s - 3 gamma) with s = sqrt(2 D) (gamma - 1); a wide range makes rounding small."""
    gamma = 1e300 ** (1 / (NoiseSchedule.suggest_levels(1e298, 0.01, dimension, C=overlap) - 1))
    shift, phi = math.sqrt(2 * dimension) * (gamma - 1), NormalDist().cdf
    assert phi(shift + 3 * gamma) - phi(shift - 3 * gamma) == pytest.approx(overlap, abs=1e-4)


# -- Few dimensions


@pytest.mark.parametrize("dimension", [1, 2, 3, 5, 20, 64, 130])
@pytest.mark.parametrize("overlap", [0.1, 0.5])
def test_the_ratio_of_levels_is_limited_in_few_dimensions(dimension, overlap):
    for sigma_max in (5.59, 7.37):  # with the limit, 30.8 and 32.2 ratios between the ends
        levels = NoiseSchedule.suggest_levels(sigma_max, 0.01, dimension, C=overlap)
        ratio = (sigma_max / 0.01) ** (1 / (levels - 1))
        assert 0.96**-4 < ratio <= 0.95**-4


def test_the_ratio_of_levels_is_that_of_technique_2_from_dimension_131_on():
    """For C = 0.5 the limit and technique 2 agree there: 32 levels from 5.59 to 0.01."""
    counts = [NoiseSchedule.suggest_levels(5.59, 0.01, dimension) for dimension in (130, 131, 132, 140, 784)]
    assert counts == [32, 32, 32, 33, 81]


@pytest.mark.parametrize("deviation", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("ratio", [0.95**-4, 1.1, 1.5])
def test_one_euler_step_per_level_reduces_the_deviation_by_gamma_to_the_quarter(deviation, ratio):
    """From sigma far above the deviation of the data to far below it. This is the reason for the limited ratio."""
    sigma = 1e3 * deviation
    found = math.hypot(deviation, sigma)
    while sigma > 1e-3 * deviation:
        found *= 1 - (1 - 1 / ratio) * sigma**2 / (deviation**2 + sigma**2)
        sigma /= ratio
    assert found / math.hypot(deviation, sigma) == pytest.approx(ratio**-0.25, rel=1e-4)


@pytest.mark.slow
def test_annealed_langevin_dynamics_samples_two_modes_with_the_schedule_from_data():
    """Two Gaussians with weights 0.8 and 0.2. With the two levels that technique 2 alone gives, sampling fails."""
    world = GaussianMixture([0.8, 0.2], [[1.0, 1.0], [-4.0, -4.0]], 0.25)
    schedule = NoiseSchedule.from_data(world.sample(1000, seed(0)))
    assert len(schedule) > 30
    n = 2000
    x = run(AnnealedLangevinSampler(world, schedule, steps_per_level=20), n, shape=(2,), generator=1)
    large = x.sum(1) > -3
    assert abs(float(large.float().mean()) - 0.8) < 4 * math.sqrt(0.16 / n) + 0.02
    for mode, mean in [(x[large], 1.0), (x[~large], -4.0)]:
        assert (mode.mean(0) - mean).abs().max() < 4 * 0.5 / math.sqrt(len(mode)) + 0.02
        assert (mode.std(0) / 0.5 - 1).abs().max() < 4 / math.sqrt(2 * len(mode)) + 0.1
    coarse = AnnealedLangevinSampler(world, NoiseSchedule([schedule.sigma_max, 0.01]), steps_per_level=20)
    wrong = run(coarse, n, shape=(2,), generator=1)
    assert float(wrong.std(0).mean()) > 2 * float(x.std(0).mean())


@pytest.mark.slow
def test_annealed_langevin_dynamics_samples_a_ring_with_the_schedule_from_data():
    """With the sampler's default number of steps."""
    angle = torch.arange(64) * 2 * math.pi / 64
    ring = GaussianMixture([1 / 64] * 64, (2 * torch.stack([angle.cos(), angle.sin()], 1)).tolist(), 0.01)
    schedule = NoiseSchedule.from_data(ring.sample(500, seed(0)))
    n = 1000
    x = run(AnnealedLangevinSampler(ring, schedule), n, shape=(2,), generator=1)
    radius = x.norm(dim=1)
    assert abs(float(radius.mean()) - 2) < 4 * 0.1 / math.sqrt(n) + 0.01
    assert abs(float(radius.std()) / 0.1 - 1) < 4 / math.sqrt(2 * n) + 0.1
    assert x.mean(0).abs().max() < 4 * math.sqrt(2 / n) + 0.02


# -- Bad input


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "at least one level"),
        ([[1.0, 0.5]], "one-dimensional"),
        ([0.1, 1.0], "strictly descending.*level 0 is 0.1 and level 1 is 1"),
        ([1.0, 0.5, 0.5], r"level 1 is 0.5 and level 2 is 0.5. Write np.unique\(sigmas\)\[::-1\]"),
        ([1.0, 0.0], "positive, from 1e-18 to 1e[+]18, got 0"),
        ([1.0, -0.1], "positive, from 1e-18 to 1e[+]18, got -0.1"),
        ([1.0, float("nan")], "positive, from 1e-18 to 1e[+]18, got nan"),
        ([1e19, 1.0], "positive, from 1e-18 to 1e[+]18, got 1e[+]19"),
        ([float("inf"), 1.0], "positive, from 1e-18 to 1e[+]18, got inf"),
    ],
)
def test_invalid_levels_raise(sigmas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(sigmas)


def test_the_code_that_the_message_about_the_order_suggests_works():
    for sigmas in ([0.1, 1.0, 1.0], np.array([0.1, 1.0, 1.0]), torch.tensor([0.1, 1.0, 1.0], dtype=torch.float64)):
        with pytest.raises(ValueError, match="strictly descending") as error:
            NoiseSchedule(sigmas)
        code = str(error.value).partition("Write ")[2].rstrip(".")
        assert NoiseSchedule(eval(code, {"np": np, "sigmas": sigmas})) == NoiseSchedule([1.0, 0.1])  # noqa: S307


def test_a_string_in_place_of_sigmas_raises():
    with pytest.raises(TypeError, match="sigmas must be numbers"):
        NoiseSchedule("loud")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NoiseSchedule([1.0, 0.0]), ValueError, "got 0. Leave out the level 0: samplers end with a step to it"),
        (lambda: NoiseSchedule.geometric(0.01, 50, 10), ValueError, "sigma_max > sigma_min > 0"),
        (lambda: NoiseSchedule.geometric(1, 0, 10), ValueError, "sigma_max > sigma_min > 0"),
        (lambda: NoiseSchedule.geometric(1, 0.1, 1), ValueError, "levels must be an integer of at least 2, got 1"),
        (lambda: NoiseSchedule.geometric(1, 0.1, 2.5), TypeError, "levels must be an integer of at least 2, got 2.5"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.0]), ValueError, "strictly between 0 and 1, got 1"),
        (lambda: NoiseSchedule.from_betas([]), ValueError, r"with at least one number, got shape \(0,\)"),
        (lambda: NoiseSchedule.suggest_levels(50, 0.01, 0), ValueError, "dimension must be an integer of at least 1"),
        (lambda: NoiseSchedule.suggest_levels(50, 0.01, 3072, C=1.0), ValueError, "C must be between 0 and 0.997"),
        (lambda: NoiseSchedule([1.0, 0.1]).respaced(1), ValueError, "levels must be an integer of at least 2"),
        (lambda: NoiseSchedule([1.0, 0.1]).between(2), ValueError, "sigma_max must be in the range .* 0.1 to 1, got 2"),
        (
            lambda: NoiseSchedule([1.0, 0.1]).between(None, 0.05),
            ValueError,
            "sigma_min must be in the range .*got 0.05",
        ),
        (lambda: NoiseSchedule([1.0, 0.1]).between(0.2, 0.2), ValueError, "sigma_max > sigma_min > 0"),
        (lambda: NoiseSchedule([1.0, 0.1]).between(math.nan), ValueError, "sigma_max must be in the range"),
        (lambda: NoiseSchedule([1.0, 0.1]).sample(-1), ValueError, "n must be an integer of at least 1, got -1"),
        (lambda: NoiseSchedule([1.0, 0.1]).suggest_step_size(0), ValueError, "steps_per_level must be an integer of"),
        (lambda: NoiseSchedule([1.0, 0.1]).level_variance(0.01, 0), ValueError, "steps_per_level must be an integer"),
        (lambda: NoiseSchedule([1.0, 0.1]).chain_variance(0.01, 0), ValueError, "steps_per_level must be an integer"),
        (lambda: NoiseSchedule([1.0, 0.1]).level_variance(0.0, 3), ValueError, "between 0 and 2 sigma_min"),
        (lambda: NoiseSchedule([1.0, 0.1]).chain_variance(0.03, 3), ValueError, "between 0 and 2 sigma_min"),
        (lambda: NoiseSchedule.from_dict({"levels": 3}), ValueError, r'be a dict \{"sigmas": \[...\]\}, got .*levels'),
        (lambda: NoiseSchedule.from_data(torch.zeros(2, 3).long()), TypeError, "Write images / 255"),
        (lambda: NoiseSchedule.from_data(torch.zeros(2, 3) * 1j), TypeError, r"torch.cat\(\[images.real, images.imag"),
        (lambda: NoiseSchedule.from_data(torch.zeros(1, 3)), ValueError, "at least two images"),
        (lambda: NoiseSchedule.from_data(torch.zeros(5, 3)), ValueError, "largest distance between two images is 0"),
        (lambda: NoiseSchedule.from_data(torch.tensor([[0.0], [math.nan]])), ValueError, "NaN or infinity"),
        (lambda: NoiseSchedule.from_data(torch.tensor([[0.0], [math.inf]])), ValueError, "NaN or infinity"),
        (lambda: NoiseSchedule.from_data([torch.zeros(2, 3), torch.zeros(2)]), TypeError, r"got list.*\[x, y\]"),
        (lambda: NoiseSchedule.from_data(list(torch.eye(3))), TypeError, r"got list.*write torch.stack\(images\)"),
        (lambda: NoiseSchedule.from_data("images"), TypeError, "must be a tensor or an array .*, got str"),
        (lambda: NoiseSchedule.from_data(torch.eye(3), generator="1"), TypeError, "torch.Generator or a seed, got '1'"),
        (lambda: NoiseSchedule.from_data(torch.eye(3), generator=[1, 2]), TypeError, r"or a seed, got \[1, 2\]"),
    ],
)
def test_invalid_arguments_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_karras_levels_are_linear_in_their_rho_th_root():
    schedule = NoiseSchedule.karras(80, 0.002, levels=18)
    assert (schedule.sigma_max, schedule.sigma_min, len(schedule)) == (80, 0.002, 18)
    steps = (schedule.sigmas ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps.mean().expand(17))
    linear = NoiseSchedule.karras(4, 1, levels=4, rho=1)
    torch.testing.assert_close(linear.sigmas, torch.tensor([4.0, 3, 2, 1], dtype=torch.float64))


def test_karras_levels_with_a_very_small_or_large_rho():
    small = NoiseSchedule.karras(80, 0.002, levels=3, rho=1e-3)  # the roots are 80^1000 and 0.002^1000
    assert small[1] == pytest.approx(80 * 0.5**1e-3, rel=1e-12)
    large = NoiseSchedule.karras(80, 0.002, levels=18, rho=1e17)
    torch.testing.assert_close(large.sigmas, NoiseSchedule.geometric(80, 0.002, levels=18).sigmas)


@pytest.mark.parametrize("rho", [0, -1, float("nan"), float("inf")])
def test_karras_raises_for_a_rho_that_is_not_positive_and_finite(rho):
    with pytest.raises(ValueError, match="rho must be positive and finite"):
        NoiseSchedule.karras(80, 0.002, levels=18, rho=rho)
