"""The start and the steps for data whose covariance is known: exact for normal data, of the right order for others."""

import itertools
import math

import pytest
import torch

from scorematch import NoiseSchedule
from scorematch.core.cosines import Cosines
from scorematch.nets.precondition import Units
from scorematch.restoration import Grayscale, Observation
from scorematch.sampling import ODESampler, SamplerSettings, data_moments
from tests.helpers import run, seed

SHAPE = (3, 6, 4)
MEAN = [0.5, -2.0, 0.1]
COSINES = Cosines(torch.zeros(1, *SHAPE))
SPECTRUM = [9 / (1 + i) for i in range(COSINES.bands)]
VARIANCES = COSINES.spread(torch.tensor([SPECTRUM]))
MOMENTS = {"data_mean": MEAN, "data_spectrum": SPECTRUM}
MIDDLE = torch.tensor(MEAN).view(-1, 1, 1)


def normal_score(x, sigma):
    """The score of normal data with these moments."""
    return COSINES.inverse(COSINES.transform(MIDDLE - x) / (VARIANCES + sigma**2))


@pytest.mark.parametrize(("method", "order"), [("dpm-solver++", 1), ("dpm-solver++", 3), ("unipc", 2)])
@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_normal_data_are_exact_on_any_levels(method, order, eta):
    z, *new = torch.randn(3, 5, *SHAPE, generator=seed(0))
    sampler = ODESampler(
        normal_score, sigmas=[3, 0.7, 0.05], method=method, order=order, eta=eta, denoise=False, **MOMENTS
    )
    expected, noise = z, iter(new)
    for high, low in itertools.pairwise(sampler.schedule):  # in units of the deviations at the level
        ratio = ((VARIANCES + low**2) / (VARIANCES + high**2)) ** eta
        fresh = COSINES.transform(next(noise)) * (1 - ratio).sqrt()
        expected = COSINES.inverse(COSINES.transform(expected) * ratio.sqrt() + fresh)
    expected = MIDDLE + COSINES.inverse(COSINES.transform(expected) * (VARIANCES + 0.05**2).sqrt())
    source = iter(new)
    found = run(sampler, init=sampler.start(z), noise_source=lambda x: next(source))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def two_modes(x, sigma):
    """The score of independent mixtures of normal distributions with deviation 0.5 at -1 and 1."""
    variance = 0.5**2 + sigma**2
    return ((x / variance).tanh() - x) / variance


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_without_variance_the_steps_are_those_without_moments(eta):
    x, *new = torch.randn(5, 4, *SHAPE, generator=seed(1))
    options = {"sigmas": [2, 1, 0.6, 0.3, 0.1], "method": "dpm-solver++", "order": 1, "eta": eta}
    found = []
    for moments in ({}, {"data_mean": MEAN, "data_spectrum": [0.0] * COSINES.bands}):
        noise = iter(new)
        found.append(run(ODESampler(two_modes, **options, **moments), init=2 * x, noise_source=lambda x: next(noise)))  # noqa: B023
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "order", "rate"), [("dpm-solver++", 1, 1), ("dpm-solver++", 2, 2), ("unipc", 2, 3)])
def test_the_order_for_data_that_are_not_normal(method, order, rate):
    x = 2 * torch.randn(20, *SHAPE, generator=seed(2), dtype=torch.float64)
    exact = run(ODESampler(two_modes, NoiseSchedule.geometric(2, 0.2, 1500), method="unipc", order=3), init=x)
    errors = []
    for levels in (11, 21):
        schedule = NoiseSchedule.geometric(2, 0.2, levels)
        found = run(ODESampler(two_modes, schedule, method=method, order=order, **MOMENTS), init=x)
        errors.append(float((found - exact).square().mean().sqrt()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(rate, abs=0.25)


@pytest.mark.slow
def test_the_start_is_where_the_flow_of_normal_data_is_and_its_moments_are_found():
    z = torch.randn(1000, *SHAPE, generator=seed(0))
    few = ODESampler(
        normal_score, sigmas=[0.7, 0.6], method="unipc", denoise=False, data_mean=MEAN, data_spectrum=SPECTRUM
    )
    assert str(few) == "ODESampler(2 levels 0.7 -> 0.6, unipc, normal, 1 network calls)"
    flow = ODESampler(normal_score, NoiseSchedule.geometric(1e4, 0.7, 80), method="unipc", order=3, denoise=False)
    torch.testing.assert_close(few.start(z[:8]), run(flow, init=MIDDLE + 1e4 * z[:8]), rtol=1e-3, atol=2e-3)

    found = data_moments(few.start(z), mean_side=1)
    size = COSINES.spread(torch.eye(COSINES.bands)).flatten(1).sum(1)
    variance = torch.tensor(SPECTRUM) + 0.7**2
    errors = (torch.tensor(found["data_spectrum"]) / variance - 1) / (2 / (1000 * size)).sqrt()
    assert errors.abs().max() < 5
    assert found["data_mean"] == pytest.approx(MEAN, abs=5 * float((variance.max() / 1000).sqrt()))


def test_a_smooth_mean_is_found_and_used_at_a_low_resolution():
    y, x = (torch.arange(n) + 0.5 for n in SHAPE[1:])
    mean = torch.stack([0.5 + i * torch.cos(math.pi / 6 * y)[:, None] * torch.cos(math.pi / 4 * x) for i in range(3)])
    found = data_moments(torch.stack([mean - 1, mean + 1]), mean_side=2)
    assert len(found["data_mean"]) == 12 and found["data_mean"][:4] == pytest.approx([0.5] * 4, abs=1e-4)
    options = {"data_mean": found["data_mean"], "data_spectrum": SPECTRUM, "method": "unipc", "denoise": False}
    sampler = ODESampler(lambda x, sigma: normal_score(x - mean + MIDDLE, sigma), sigmas=[2, 0.3], **options)
    start = sampler.start(torch.zeros(1, *SHAPE))
    torch.testing.assert_close(start[0], mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(run(sampler, init=start)[0], mean, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"mean_side must be at most 4 for samples of the shape \(3, 6, 4\)"):
        data_moments(torch.randn(3, *SHAPE), mean_side=5)
    wrong = ODESampler(normal_score, sigmas=[0.7, 0.1], data_mean=MEAN[:2] * 4, data_spectrum=SPECTRUM)
    with pytest.raises(ValueError, match=r"data_mean must have 12 numbers .* got 8"):
        wrong.sample(1, shape=SHAPE, progress=False)


def test_a_mean_far_from_zero_is_not_rounded_to_a_part_of_the_deviation():
    """Pressures of 101,325 +- 10 Pa: the middle of the samples was off by 2.5 deviations."""
    z = torch.randn(500, *SHAPE, generator=seed(0))
    pressures = 101_325 + 10 * (z - z.mean(0))
    assert data_moments(pressures)["data_mean"] == pytest.approx([101_325.0] * 3 * 4**2, abs=0.1)


class Measured:
    """The score of normal data of any sides, for which the spectrum of samples of one shape is known."""

    sample_shape = SHAPE

    def __call__(self, x, sigma):
        return -x


@pytest.mark.parametrize("shape", [(3, 12, 8), (3, 5, 9), (3, 3, 2), (3, 24, 4)])
def test_samples_of_other_sides_have_the_spectrum_at_the_same_frequencies(shape):
    """The standard deviation is linear in the frequency, so that the interpolation between the bands is exact."""

    def of(shape):
        cosines = Cosines(torch.zeros(1, *shape, dtype=torch.float64))
        return cosines, cosines.means(cosines.frequency[None])[0] / max(shape[1:])

    (_, known), (cosines, frequencies) = of(SHAPE), of(shape)
    moments = {"data_mean": MEAN, "data_spectrum": (3 - known).square().tolist()}
    sampler = ODESampler(Measured(), sigmas=[1e-4, 1e-5], method="unipc", **moments)
    ones = cosines.inverse(torch.ones(1, *shape, dtype=torch.float64))
    found = cosines.means(cosines.transform(sampler.start(ones) - sampler.start(0 * ones)))[0]
    inside = (frequencies >= known.unique()[1]) & (frequencies <= known.max())
    torch.testing.assert_close(found[inside], (3 - frequencies)[inside], rtol=1e-5, atol=0)
    brightness = 3 * math.sqrt(math.prod(shape) / math.prod(SHAPE))  # the mean value has the same deviation
    assert found[frequencies == 0].tolist() == pytest.approx([brightness] * 3, rel=1e-5)
    with pytest.raises(ValueError, match=r"data_mean must have 2 numbers"):
        sampler.sample(1, shape=(2, 6, 4), progress=False)

    fine = moments | {"data_mean": [value for value in MEAN for _ in range(16)]}  # more values than some of the sides
    start = ODESampler(Measured(), sigmas=[1e-4, 1e-5], method="unipc", **fine).start(0 * ones)
    torch.testing.assert_close(start, sampler.start(0 * ones), rtol=0, atol=1e-5)


class InUnits:
    """The score of the normal data whose channels have other units."""

    units = Units((0.0,) * 3, (0.5, 2.0, 64.0), relative=True)
    ratios = torch.tensor(units.ratios).view(-1, 1, 1)

    def __call__(self, x, sigma):
        return normal_score(x / self.ratios, sigma) / self.ratios


def test_channels_of_different_units():
    net, z = InUnits(), torch.randn(40, *SHAPE, generator=seed(3))
    options = {"sigmas": [3, 0.7, 0.05], "method": "dpm-solver++"}
    same = ODESampler(normal_score, **options, **MOMENTS)
    expected = run(same, init=same.start(z))
    sampler = ODESampler(net, **options, **MOMENTS)
    found = run(sampler, init=sampler.start(z) * net.ratios)
    torch.testing.assert_close(found, expected * net.ratios, rtol=1e-4, atol=1e-3)
    assert data_moments(found, net=net) == data_moments(found / net.ratios)
    with pytest.raises(ValueError, match=r"different units. Write \*\*data_moments\(data, net=net\)"):
        ODESampler(net, **options, **data_moments(found)).sample(2, shape=SHAPE, progress=False)


def test_the_moments_are_stored_and_checked():
    images = torch.randn(50, *SHAPE, generator=seed(0))
    settings = SamplerSettings("ode", method="unipc", sigmas=[0.7, 0.1], **data_moments(images))
    assert SamplerSettings.from_dict(settings.to_dict()) == settings
    with pytest.raises(ValueError, match=r"data_mean.*data_spectrum"):
        SamplerSettings("ode", method="unipc", sigmas=[0.7, 0.1], data_mean=MEAN)
    for wrong in (images[:1], images / 0):
        with pytest.raises(ValueError, match=r"two or more samples .* without NaN"):
            data_moments(wrong)
    half = (1000 * images).half()  # the variance is beyond the range of float16
    assert data_moments(half) == data_moments(half.float())
    with pytest.raises(TypeError, match=r"data must be floating point, .* Write data / 255 for 8-bit images"):
        data_moments(images.long())
    one = ODESampler(normal_score, sigmas=[0.7], method="dpm-solver++", **MOMENTS)  # no steps but the denoising
    x = one.start(images)
    torch.testing.assert_close(run(one, init=x), x + 0.7**2 * normal_score(x, 0.7))
    short = ODESampler(normal_score, sigmas=[0.7, 0.1], data_mean=MEAN, data_spectrum=SPECTRUM[:-1])
    wanted = rf"data_spectrum must have {len(SPECTRUM)} numbers .* got {len(SPECTRUM) - 1}\."
    with pytest.raises(ValueError, match=wanted):
        short.sample(1, shape=SHAPE, progress=False)
    with pytest.warns(UserWarning, match="the highest level of this sampler, 0.7, is for a start from the normal"):
        run(ODESampler(normal_score, **settings.options), observation=Observation(Grayscale(), images[:1, :1]))
