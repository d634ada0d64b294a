"""Log-likelihood against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.data import open_images
from scorematch.evaluation.data_likelihood import data_likelihood
from scorematch.evaluation.exact import Gaussian
from scorematch.likelihood import bits_per_dimension, log_likelihood
from tests.helpers import HostReads, NoFloat64, point, seed

WIDE = NoiseSchedule.karras(50, 0.05, 200)


def likelihood(net, x, schedule=WIDE, **arguments):
    return log_likelihood(net, x, schedule, progress=False, **arguments)


def _gaussian(world, x, schedule):
    """The exact result for a Gaussian and the start N(0, sigma_max^2): the flow scales each axis of the covariance."""
    values, vectors = world.values.double(), world.vectors.double()
    along = (x.double() - world.mean) @ vectors
    scale = ((values + schedule.sigma_max**2) / (values + schedule.sigma_min**2)).sqrt()
    there = along * scale @ vectors.T + world.mean
    normal = torch.distributions.Normal(0.0, schedule.sigma_max)
    return normal.log_prob(there).sum(1) + scale.log().sum()


@pytest.mark.slow
def test_likelihood_of_a_gaussian_has_its_closed_form_with_second_order_error(world):
    x = world.sample(100, seed(0)).double()
    exact = _gaussian(world, x, WIDE)
    errors = [
        float((likelihood(world, x, NoiseSchedule.karras(50, 0.05, levels), probes=None) - exact).abs().max())
        for levels in (51, 101, 201)
    ]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.15), errors
    assert errors[-1] < 3e-3  # nats


def test_error_of_the_normal_start_is_its_kullback_leibler_divergence(world):
    """It is the divergence of the data with noise of level sigma_max from the start, which the flow preserves."""
    schedule = NoiseSchedule.karras(5, 0.05, 100)
    rng, n = seed(0), 4000
    x = world.sample(n, rng).double()
    x += schedule.sigma_min * torch.randn(n, 3, generator=rng, dtype=torch.float64)
    values, vectors = world.values.double(), world.vectors.double()
    quiet = values + schedule.sigma_min**2
    own = -(((x - world.mean) @ vectors) ** 2 / quiet).sum(1) / 2 - (2 * math.pi * quiet).log().sum() / 2
    cost = own - likelihood(world, x, schedule, probes=None)
    excess = values / schedule.sigma_max**2
    moment = float(world.mean.square().sum() / schedule.sigma_max**2 + excess.sum()) / 2
    divergence = moment - float(torch.log1p(excess).sum()) / 2
    assert abs(cost.mean() - divergence) < 5 * cost.std() / math.sqrt(n) + 3e-3
    assert 0 < divergence < moment  # the documented bound


@pytest.mark.slow
def test_likelihood_of_a_mixture_has_its_closed_form_and_integrates_to_one(mixture):
    """The mean is zero, so that the error of the normal start is of second order in 1 / sigma_max at each point."""
    mixture = type(mixture)([0.5, 0.5], [[1.5, 1.5], [-1.5, -1.5]], 0.25)
    x = mixture.sample(300, seed(0)).double()
    found = likelihood(mixture, x, NoiseSchedule.karras(100, 0.05, 300), probes=None)
    # The start has an error of at most 4.75 z^2 / (2 * 100^2) = 0.004 at four deviations; 300 levels have the rest.
    torch.testing.assert_close(found, mixture.log_density(x, 0.05), rtol=0, atol=1e-2)
    axis = torch.linspace(-6, 6, 41, dtype=torch.float64)
    mass = likelihood(mixture, torch.cartesian_prod(axis, axis), probes=None).exp().sum() * 0.3**2
    assert mass == pytest.approx(1, abs=2e-3)


def test_likelihood_for_data_at_a_point_is_exact_with_few_levels():
    """The paths are straight, so the result is the density of N(0, sigma_min^2)."""
    x = torch.randn(20, 5, generator=seed(0), dtype=torch.float64)
    found = likelihood(point, x, NoiseSchedule([10.0, 3.0, 0.7]), probes=None)
    torch.testing.assert_close(found, torch.distributions.Normal(0.0, 0.7).log_prob(x).sum(1))
    middle = Gaussian([4.0] * 5, 0.0, value_range=(1, 7))  # the start has the mean of the range
    torch.testing.assert_close(likelihood(middle, x + 4, NoiseSchedule([10.0, 3.0, 0.7]), probes=None), found)


@pytest.mark.slow
def test_random_directions_estimate_the_trace_without_bias(world):
    """With four directions the standard deviation is half of that with one."""
    x = world.sample(1, seed(0)).double().expand(2000, 3)
    schedule = NoiseSchedule.karras(50, 0.05, 40)
    exact = likelihood(world, x[:1], schedule, probes=None)
    spreads = []
    for probes in (1, 4):
        found = likelihood(world, x, schedule, probes=probes, generator=seed(1))
        assert abs(found.mean() - exact) < 5 * found.std() / math.sqrt(2000)
        spreads.append(found.std())
    assert spreads[0] > 1e-3
    assert spreads[0] / spreads[1] == pytest.approx(2, rel=5 * math.sqrt(1 / 2000))


@pytest.mark.slow
def test_one_random_direction_gives_the_exact_trace_of_a_diagonal_jacobian():
    x = torch.randn(5, 7, generator=seed(0), dtype=torch.float64)
    one, exact = (
        likelihood(lambda x, sigma: -x / (1 + sigma**2), x, probes=probes, generator=seed(1)) for probes in (1, None)
    )
    torch.testing.assert_close(one, exact)


@pytest.mark.slow
def test_images_do_not_depend_on_each_other(rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=NoiseSchedule.geometric(5, 0.05, 10))
    torch.nn.init.normal_(net.backbone.conv_out.weight, std=0.1, generator=rng)
    x = torch.rand(3, 1, 8, 8, generator=rng)
    schedule = NoiseSchedule.karras(5, 0.05, 4)
    for function in (log_likelihood, bits_per_dimension):
        whole = function(net, x, schedule, generator=[seed(i) for i in range(3)], progress=False)
        parts = [function(net, x[i : i + 1], schedule, generator=[seed(i)], progress=False) for i in range(3)]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-3)


def test_log_likelihood_changes_neither_network_nor_global_generator(rng):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(5, 0.05, 4)).train()
    state, x = torch.get_rng_state(), torch.rand(2, 1, 8, 8, generator=rng)
    before = x.clone()
    found = log_likelihood(net, x, net.schedule, generator=rng, progress=False)
    assert net.training and not found.requires_grad and torch.isfinite(found).all()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, before)


def test_bits_per_dimension_of_a_certain_score_are_the_documented_minimum():
    """For black images and their exact score: log2(255 sigma sqrt(2 pi)) plus a term for the dequantization noise."""
    sigma = 0.02
    schedule = NoiseSchedule.karras(5, sigma, 10)
    images = torch.zeros(50, 1000, dtype=torch.float64)
    found = bits_per_dimension(point, images, schedule, probes=1, generator=seed(0), progress=False)
    spread = 1 / (12 * 255**2) / (2 * sigma**2) / math.log(2)  # of the dequantization noise, relative to sigma
    assert float(found.mean()) == pytest.approx(math.log2(255 * sigma * math.sqrt(2 * math.pi)) + spread, abs=1e-4)


@pytest.mark.slow
def test_bits_per_dimension_of_a_wide_gaussian_are_its_entropy():
    """For images drawn from it. The gray levels are narrow, so that quantization does not matter."""
    deviation, n = 0.1, 200_000
    z = torch.randn(n // 100, 100, generator=seed(0))
    images = ((0.5 + deviation * z).clamp(0, 1) * 255).round() / 255
    found = bits_per_dimension(
        lambda x, sigma: -(x - 0.5) / (deviation**2 + sigma**2),
        images,
        NoiseSchedule.karras(20, 0.002, 80),
        generator=seed(1),
        progress=False,
    )
    entropy = math.log2(255 * deviation * math.sqrt(2 * math.pi * math.e))
    assert float(found.mean()) == pytest.approx(entropy, abs=5 * math.sqrt(0.5 / n) / math.log(2) + 2e-3)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (log_likelihood, {"x": torch.zeros(2, 3).long()}, TypeError, "x must be floating point.*Write x / 255"),
        (log_likelihood, {"x": torch.zeros(3)}, ValueError, r"must be a batch \(N, ...\) .*, got shape \(3,\)"),
        (log_likelihood, {"x": torch.zeros(0, 3)}, ValueError, r"at least one sample, got shape \(0, 3\)"),
        (log_likelihood, {"x": [torch.zeros(2, 3), torch.zeros(2)]}, TypeError, "got list.*pass its first entry"),
        (log_likelihood, {"x": torch.zeros(2, 3), "generator": 0.5}, TypeError, "torch.Generator or a seed, got 0.5"),
        (
            log_likelihood,
            {"x": torch.zeros(2, 3), "net": lambda x, sigma: x[:, :1]},
            ValueError,
            r"shape \(2, 1\) for x",
        ),
        (
            log_likelihood,
            {"x": torch.zeros(2, 3), "probes": 0},
            ValueError,
            "probes must be an integer of at least 1, got 0",
        ),
        (log_likelihood, {"x": torch.zeros(2, 3), "schedule": None}, ValueError, "pass a schedule"),
        (bits_per_dimension, {"images": torch.zeros(2, 3).long()}, TypeError, "Write images / 255"),
        (bits_per_dimension, {"images": torch.zeros(2, 3).numpy()}, TypeError, r"torch.as_tensor\(images\)"),
        (bits_per_dimension, {"images": torch.full((2, 3), 255.0)}, ValueError, r"in \[0, 1\], got values from 255"),
        (bits_per_dimension, {"images": torch.full((2, 3), math.nan)}, ValueError, r"in \[0, 1\], got values from nan"),
    ],
)
def test_invalid_arguments_raise(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"net": lambda x, sigma: -x, "schedule": WIDE, **arguments})


@pytest.mark.slow
def test_likelihood_is_equal_in_inference_mode_and_for_wrapped_networks(rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=NoiseSchedule.geometric(10, 0.01, 6)).eval()
    torch.nn.init.normal_(net.backbone.conv_out.weight)
    few = NoiseSchedule.karras(10, 0.01, 4)
    x = torch.rand(2, 1, 8, 8, generator=rng)
    expected = likelihood(net, x, few, generator=seed(0))
    with torch.inference_mode():
        assert torch.equal(likelihood(net, x + 0, few, generator=seed(0)), expected)
    assert torch.equal(likelihood(torch.nn.DataParallel(net), x, few, generator=seed(0)), expected)


@pytest.mark.slow
def test_the_dtype_of_the_score_does_not_matter(rng):
    x = torch.randn(4, 3, generator=rng)
    found = likelihood(lambda x, sigma: (-x / (1 + sigma**2)).double(), x, probes=None)
    expected = likelihood(lambda x, sigma: -x / (1 + sigma**2), x, probes=None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_likelihood_is_the_same_under_autocast(rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8,), layers_per_block=1, schedule=NoiseSchedule.geometric(10, 0.01, 6)).eval()
    torch.nn.init.normal_(net.backbone.conv_out.weight)
    few, x = NoiseSchedule.karras(10, 0.01, 4), torch.rand(2, 1, 8, 8, generator=rng)
    expected = likelihood(net, x, few, generator=seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(likelihood(net, x, few, generator=seed(0)), expected)


def test_a_score_without_gradients_or_with_one_level_raises():
    """The trace would be wrong without any sign of it."""
    with pytest.raises(ValueError, match="score must be differentiable in x, but it was computed without gradients"):
        likelihood(torch.no_grad()(lambda x, sigma: -x), torch.zeros(2, 3))
    net = ScoreNet.unet(1, 8, widths=(8,), schedule=NoiseSchedule([0.5]))
    with pytest.raises(ValueError, match=r"one noise level, 0\.5, but the flow needs a range of levels"):
        log_likelihood(net, torch.zeros(2, 1, 8, 8), progress=False)
    with pytest.raises(ValueError, match=r"schedule must have at least two levels, .* got NoiseSchedule\(1 level"):
        log_likelihood(lambda x, sigma: -x, torch.zeros(2, 3), NoiseSchedule([0.5]), progress=False)


@pytest.mark.parametrize("function", [log_likelihood, bits_per_dimension])
def test_a_list_of_generators_of_the_wrong_length_raises(function, world):
    with pytest.raises(ValueError, match="one entry for each of the 3 samples, got 1"):
        function(world, torch.rand(3, 3), WIDE, generator=[seed(0)], progress=False)


def test_an_int_is_a_seed(rng):
    """The same generator draws the dequantization noise and then the directions."""
    x = torch.rand(2, 3, generator=rng)
    schedule = NoiseSchedule.karras(5, 0.05, 6)

    def score(x, sigma):  # its Jacobian is not diagonal, so that the result depends on the directions
        return -x - x.roll(1, 1) ** 2

    for function in (log_likelihood, bits_per_dimension):
        found = [function(score, x, schedule, generator=source, progress=False) for source in (3, seed(3), 4)]
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        found = [function(score, x, schedule, generator=source, progress=False) for source in ([3, 4], [seed(3), 4])]
        assert torch.equal(*found)


def test_dequantization_noise_is_uniform_within_one_gray_level():
    """The noise in the first x that the score gets is within half a gray level, with the variance 1/12."""
    seen = []

    def score(x, sigma):
        seen.append(x.detach())
        return -x

    images = torch.full((4, 1000), 0.5)
    bits_per_dimension(score, images, NoiseSchedule([1.0, 0.1]), generator=0, progress=False)
    u = ((seen[0] - images) * 255).double()
    assert u.abs().max() <= 0.5 + 1e-4
    assert abs(float(u.mean())) < 5 * math.sqrt(1 / 12 / u.numel())
    assert abs(float(u.square().mean()) - 1 / 12) < 5 * math.sqrt(1 / 180 / u.numel())


def test_bits_need_a_score_of_images_from_0_to_1():
    score = Gaussian([0.0] * 16, 1.0, (1, 4, 4), schedule=NoiseSchedule([10.0, 0.1]), value_range=(-1, 1))
    with pytest.raises(ValueError, match=r"of images in \[0, 1\], but its value_range is \(-1, 1\)"):
        bits_per_dimension(score, torch.rand(2, 1, 4, 4))


def test_the_condition_is_passed_to_the_score():
    conditions = []

    def score(x, sigma, *condition):
        conditions.append(condition)
        return -x

    x, schedule = torch.rand(2, 3), NoiseSchedule([1.0, 0.1])
    for condition in (None, 7, torch.arange(2)):
        likelihood(score, x, schedule, condition=condition)
    assert conditions[0] == () and torch.equal(conditions[3][0], torch.tensor([7, 7]))
    assert torch.equal(conditions[6][0], torch.arange(2))
    with torch.inference_mode():
        likelihood(score, x + 0, schedule, condition=torch.zeros(2, 3))
    assert not conditions[-1][0].is_inference()


def test_likelihood_reads_no_value_and_sends_no_float64_to_a_device():
    """Tested on the meta device, where values cannot be read. Only on the CPU float64 images stay float64."""
    with NoFloat64(), HostReads() as reads:
        for probes in (1, 2, None):
            x, schedule = torch.empty(2, 3, device="meta"), NoiseSchedule([5.0, 1.0, 0.1])
            found = likelihood(lambda x, sigma: -x, x, schedule, probes=probes, generator=0)
            assert found.shape == (2,) and found.dtype == torch.float32 and found.device.type == "meta"
    assert reads.count == 0


# -- Of a data set ----------------------------------------------------------------------------------------------------

NOISE = NoiseSchedule.karras(20, 0.002, 40)


class Digits:
    """A normal distribution of images around 0.5, rounded to 8 bits; its values are correlated."""

    def __init__(self, shape=(1, 2, 2), n=100):
        size = math.prod(shape)
        root = torch.randn(size, size, generator=seed(1), dtype=torch.float64)
        self.world = Gaussian(torch.full((size,), 0.5), 0.01 * root @ root.T / size + 0.003 * torch.eye(size), shape)
        self.images = (self.world.sample(n, 2).clamp(0, 1) * 255).round().to(torch.uint8)

    def bits(self, data=None, schedule=NOISE, **options):
        options = {"checks": 20, "progress": False, **options}
        return data_likelihood(self.world, self.images if data is None else data, schedule, **options)


@pytest.fixture(scope="module")
def digits():
    return Digits()


@pytest.mark.slow
def test_the_bits_of_a_gaussian_data_set_are_its_entropy_within_the_error(digits):
    """The gray levels are narrow, so that quantization does not matter."""
    found = digits.bits(checks=100)
    nats = 0.5 * float((2 * math.pi * math.e * digits.world.values).log().sum())
    expected = nats / (4 * math.log(2)) + math.log2(255)
    assert abs(found.bits.value + 4 / 3 * found.change.value - expected) < 4 * found.bits.error
    # The log-density of a normal distribution has the variance D / 2.
    assert found.bits.error == pytest.approx(math.sqrt(0.5 / 4 / 100) / math.log(2), rel=0.3)
    assert (found.n, found.checked, found.levels, found.dimension) == (100, 100, 40, 4)
    assert found.nats.value == pytest.approx(found.bits.value * 4 * math.log(2))
    assert str(found).startswith(f"{found.bits} bits per dimension over 100 images; the trace")


@pytest.mark.slow
def test_with_normal_noise_the_bits_are_the_entropy_of_the_noisy_data(digits):
    schedule = NoiseSchedule.karras(20, 0.05, 40)
    found = digits.bits(schedule=schedule, noise="normal", checks=100)
    nats = 0.5 * float((2 * math.pi * math.e * (digits.world.values + 0.05**2)).log().sum())
    expected = nats / (4 * math.log(2)) + math.log2(255)
    assert abs(found.bits.value + 4 / 3 * found.change.value - expected) < 4 * found.bits.error
    uniform = digits.bits(schedule=schedule)
    assert (found.noise, uniform.noise) == ("normal", "uniform") and uniform.bits.value < found.bits.value - 0.05
    # At a point the mean is the entropy of the noise, the smallest possible value.
    dark = torch.zeros(50, 1, 10, 10, dtype=torch.uint8)
    found = data_likelihood(point, dark, schedule, noise="normal", checks=2, progress=False)
    floor = math.log2(255 * 0.05 * math.sqrt(2 * math.pi * math.e))
    assert abs(found.bits.value - floor) < 5 * math.sqrt(0.5 / 5000) / math.log(2)


@pytest.mark.slow
def test_the_error_of_the_trace_is_that_of_the_mean(digits):
    options = {"schedule": NoiseSchedule.karras(20, 0.002, 16), "batch_size": 100}
    found, known = digits.bits(checks=100, **options), digits.bits(probes=None, checks=2, **options)
    differences = found.per_image - known.per_image
    assert torch.equal(found.indices, known.indices) and known.trace_error == 0
    assert abs(float(differences.mean())) < 4 * found.trace_error
    assert found.trace_error == pytest.approx(float(differences.std()) / math.sqrt(100), rel=0.3)
    assert 0.3 < digits.bits(probes=4, checks=100, **options).trace_error / found.trace_error < 0.7


@pytest.mark.slow
def test_the_change_with_twice_the_levels_shows_the_error_of_the_steps(digits):
    """The method is of second order: with the error e the change is -3/4 e."""
    options = {"probes": None, "n": 10, "checks": 10}
    coarse = digits.bits(schedule=NoiseSchedule.karras(20, 0.002, 21), **options)
    fine = digits.bits(schedule=NoiseSchedule.karras(20, 0.002, 201), **options)
    error = coarse.bits.value - fine.bits.value
    assert coarse.change.value == pytest.approx(-0.75 * error, rel=0.1) and error < -0.01
    assert abs(fine.change.value) < abs(coarse.change.value) / 50


@pytest.mark.slow
def test_bits_do_not_depend_on_the_order_the_batches_or_the_other_images(digits):
    options = {"schedule": NoiseSchedule.karras(20, 0.002, 8), "checks": 2}
    known = digits.bits(n=None, **options)
    order = torch.randperm(100, generator=seed(5))
    found = digits.bits(digits.images[order], batch_size=17, **options)
    torch.testing.assert_close(
        found.per_image[found.indices.argsort()], known.per_image[known.indices.argsort()][order], rtol=1e-5, atol=1e-5
    )
    few = digits.bits(n=10, **{**options, "checks": 20})
    rows = [int((known.indices == i).nonzero()) for i in few.indices]
    torch.testing.assert_close(few.per_image, known.per_image[rows], rtol=1e-5, atol=1e-5)
    assert few.n == 10 == few.checked and digits.bits(n=10, seed=1, **options).bits != few.bits
    assert digits.bits(n=10, **options).bits == few.bits


def test_equal_images_have_different_dequantization():
    """For data at a point m the bits are log2(255 sigma sqrt(2 pi)) + (x - m)^2 / (2 sigma^2 log 2), with x uniform."""
    point = Gaussian([0.5], 0.0, (1, 1, 1))
    images = torch.tensor([0, 255], dtype=torch.uint8).repeat(200).view(-1, 1, 1, 1)
    found = data_likelihood(point, images, NoiseSchedule.karras(1000, 1.0, 3), checks=2, progress=False)
    squares = 0.25 + 1 / (12 * 255**2)
    expected = math.log2(255 * math.sqrt(2 * math.pi)) + squares / (2 * math.log(2))
    # The square has the variance 4 m^2 Var(u / 255), to first order.
    error = math.sqrt(1 / (12 * 255**2) / 400) / (2 * math.log(2))
    assert found.bits.error == pytest.approx(error, rel=0.1) and abs(found.bits.value - expected) < 4 * error


def test_float_images_and_uint8_images_have_the_same_bits(digits):
    options = {"schedule": NoiseSchedule.karras(20, 0.002, 8), "n": 10, "checks": 2}
    found, expected = (digits.bits(data, **options) for data in (digits.images.float() / 255, digits.images))
    torch.testing.assert_close(found.bits.value, expected.bits.value, rtol=1e-2, atol=0.2)
    assert torch.equal(found.indices, expected.indices)


def test_labels_are_passed_as_the_condition(digits):
    seen = []

    def score(x, sigma, condition):
        seen.append(condition)
        return digits.world(x, sigma)

    labels = torch.arange(100) % 7
    data = open_images((digits.images, labels), labels=True)
    options = {"schedule": NoiseSchedule([1.0, 0.1]), "n": 5, "checks": 2, "progress": False}
    found = data_likelihood(score, data, condition=lambda images, labels: labels, **options)
    assert torch.equal(seen[0], labels[found.indices])
    data_likelihood(score, data, condition=3, **options)
    assert torch.equal(seen[-1], torch.full_like(seen[-1], 3))


def test_the_default_levels_are_those_of_log_likelihood():
    world = Gaussian([0.5], 0.01, (1, 1, 1), schedule=NoiseSchedule.geometric(5, 0.05, 4))
    found = data_likelihood(world, torch.zeros(2, 1, 1, 1, dtype=torch.uint8), checks=2, progress=False)
    assert found.levels == 50 and math.isfinite(found.bits.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 1}, ValueError, "n must be from 2 to the number of images, 100, got 1"),
        ({"n": 101}, ValueError, "n must be from 2 to the number of images, 100, got 101"),
        ({"checks": 1}, ValueError, "checks must be an integer of at least 2, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer of at least 1, got 0"),
        ({"probes": 0}, ValueError, "probes must be an integer of at least 1, got 0"),
        ({"noise": "none"}, ValueError, "noise must be one of 'uniform', 'normal', got 'none'"),
        ({"schedule": None}, ValueError, "pass a schedule"),
    ],
)
def test_invalid_arguments_of_data_likelihood_raise(digits, options, error, message):
    with pytest.raises(error, match=message):
        digits.bits(**options)


def test_an_image_without_a_finite_likelihood_is_named(digits):
    with pytest.raises(ValueError, match=r"likelihood: image \d+ has the values \[nan\], which are not finite"):
        data_likelihood(lambda x, sigma: x * math.nan, digits.images, NOISE, n=2, progress=False)


def test_the_number_of_probes_may_be_an_integer_of_numpy(world):
    x = world.sample(3, seed(0))
    schedule = NoiseSchedule.karras(5, 0.05, 4)
    a, b = (likelihood(world, x, schedule, probes=probes, generator=0) for probes in (np.int64(2), 2))
    assert torch.equal(a, b)
