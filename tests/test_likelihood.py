"""Log-likelihood against closed forms."""

import itertools
import math

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.likelihood import bits_per_dimension, log_likelihood
from tests.helpers import HostReads, NoFloat64, point, seed

WIDE = NoiseSchedule.karras(50, 0.05, 200)


def likelihood(net, x, schedule=WIDE, **arguments):
    return log_likelihood(net, x, schedule, progress=False, **arguments)


def _gaussian(world, x, schedule):
    """What the flow of a Gaussian makes of N(0, sigma_max^2): each axis of the covariance is scaled."""
    values, vectors = world.values.double(), world.vectors.double()
    along = (x.double() - world.mean) @ vectors
    scale = ((values + schedule.sigma_max**2) / (values + schedule.sigma_min**2)).sqrt()
    there = along * scale @ vectors.T + world.mean
    normal = torch.distributions.Normal(0.0, schedule.sigma_max)
    return normal.log_prob(there).sum(1) + scale.log().sum()


def test_a_gaussian_is_the_closed_form_and_the_error_of_second_order(world):
    x = world.sample(100, seed(0)).double()
    exact = _gaussian(world, x, WIDE)
    errors = [
        float((likelihood(world, x, NoiseSchedule.karras(50, 0.05, levels), probes=None) - exact).abs().max())
        for levels in (51, 101, 201)
    ]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([2, 2], abs=0.15), errors
    assert errors[-1] < 3e-3  # nats


def test_the_error_of_the_start_is_the_divergence_of_the_loudest_density(world):
    """The flow keeps the Kullback-Leibler divergence of the data with noise of sigma_max from the normal start."""
    schedule = NoiseSchedule.karras(5, 0.05, 200)
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
    assert 0 < divergence < moment  # the bound that is stated


def test_a_mixture_is_the_closed_form_and_has_mass_one(mixture):
    """Of mean zero: then the error of the start is of second order in 1 / sigma_max at each point."""
    mixture = type(mixture)([0.5, 0.5], [[1.5, 1.5], [-1.5, -1.5]], 0.5)
    x = mixture.sample(300, seed(0)).double()
    found = likelihood(mixture, x, NoiseSchedule.karras(100, 0.05, 400), probes=None)
    # Of the start at most 4.75 z^2 / (2 * 100^2) = 0.004 at four deviations; the rest is for 400 levels.
    torch.testing.assert_close(found, mixture.log_density(x, 0.05), rtol=0, atol=1e-2)
    axis = torch.linspace(-6, 6, 61, dtype=torch.float64)
    mass = likelihood(mixture, torch.cartesian_prod(axis, axis), probes=None).exp().sum() * 0.2**2
    assert mass == pytest.approx(1, abs=2e-3)


def test_data_at_a_point_are_exact_at_any_number_of_levels():
    """Straight paths, and no trace: what is left is the prior's own formula."""
    x = torch.randn(20, 5, generator=seed(0), dtype=torch.float64)
    found = likelihood(point, x, NoiseSchedule([10.0, 3.0, 0.7]), probes=None)
    torch.testing.assert_close(found, torch.distributions.Normal(0.0, 0.7).log_prob(x).sum(1))


def test_random_directions_agree_with_the_trace(world):
    """Unbiased, with the spread that their number says: the off-diagonal of the Jacobian, integrated."""
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


def test_on_a_diagonal_jacobian_one_direction_is_the_trace():
    x = torch.randn(5, 7, generator=seed(0), dtype=torch.float64)
    one, exact = (
        likelihood(lambda x, sigma: -x / (1 + sigma**2), x, probes=probes, generator=seed(1)) for probes in (1, None)
    )
    torch.testing.assert_close(one, exact)


def test_images_do_not_depend_on_each_other(rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8, 8), schedule=NoiseSchedule.geometric(5, 0.05, 10))
    torch.nn.init.normal_(net.backbone.conv_out.weight, std=0.1, generator=rng)
    x = torch.rand(3, 1, 8, 8, generator=rng)
    schedule = NoiseSchedule.karras(5, 0.05, 6)
    for function in (log_likelihood, bits_per_dimension):
        whole = function(net, x, schedule, generator=[seed(i) for i in range(3)], progress=False)
        parts = [function(net, x[i : i + 1], schedule, generator=[seed(i)], progress=False) for i in range(3)]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-3)


def test_a_network_is_left_as_it_was_and_so_is_the_global_seed(rng):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule.geometric(5, 0.05, 4)).train()
    state, x = torch.get_rng_state(), torch.rand(2, 1, 8, 8, generator=rng)
    before = x.clone()
    found = log_likelihood(net, x, generator=rng, progress=False)
    assert net.training and not found.requires_grad and torch.isfinite(found).all()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, before)


def test_bits_of_certainty_are_the_stated_floor():
    """A score that is certain of black, at the level's own blur: log2(255 sigma sqrt(2 pi)), and the dequantization."""
    sigma = 0.02
    schedule = NoiseSchedule.karras(5, sigma, 10)
    images = torch.zeros(50, 1000, dtype=torch.float64)
    found = bits_per_dimension(point, images, schedule, probes=1, generator=seed(0), progress=False)
    spread = 1 / (12 * 255**2) / (2 * sigma**2) / math.log(2)  # of u, in units of the blur
    assert float(found.mean()) == pytest.approx(math.log2(255 * sigma * math.sqrt(2 * math.pi)) + spread, abs=1e-4)


def test_bits_of_a_wide_gaussian_are_its_entropy():
    """On images that come from it; the cells are narrow, so quantization takes nothing away."""
    deviation, n = 0.1, 200_000
    z = torch.randn(n // 100, 100, generator=seed(0), dtype=torch.float64)
    images = ((0.5 + deviation * z).clamp(0, 1) * 255).round() / 255
    found = bits_per_dimension(
        lambda x, sigma: -(x - 0.5) / (deviation**2 + sigma**2),
        images,
        NoiseSchedule.karras(50, 0.002, 100),
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
        (log_likelihood, {"x": torch.zeros(2, 3), "probes": 0}, ValueError, "or None for the exact trace, got 0"),
        (log_likelihood, {"x": torch.zeros(2, 3), "schedule": None}, ValueError, "pass a schedule"),
        (bits_per_dimension, {"images": torch.zeros(2, 3).long()}, TypeError, "Write images / 255"),
        (bits_per_dimension, {"images": torch.zeros(2, 3).numpy()}, TypeError, "images must be a tensor.*got ndarray"),
        (bits_per_dimension, {"images": torch.full((2, 3), 255.0)}, ValueError, r"in \[0, 1\], got values from 255"),
        (bits_per_dimension, {"images": torch.full((2, 3), math.nan)}, ValueError, r"in \[0, 1\], got values from nan"),
    ],
)
def test_bad_arguments(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**{"net": lambda x, sigma: -x, "schedule": WIDE, **arguments})


def test_inference_mode_and_wrapped_networks_change_nothing(rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(8, 8), schedule=NoiseSchedule.geometric(10, 0.01, 6)).eval()
    torch.nn.init.normal_(net.backbone.conv_out.weight)
    few = NoiseSchedule.karras(10, 0.01, 4)
    x = torch.rand(2, 1, 8, 8, generator=rng)
    expected = likelihood(net, x, few, generator=seed(0))
    with torch.inference_mode():
        assert torch.equal(likelihood(net, x + 0, few, generator=seed(0)), expected)
    assert torch.equal(likelihood(torch.nn.DataParallel(net), x, few, generator=seed(0)), expected)


@pytest.mark.parametrize("function", [log_likelihood, bits_per_dimension])
def test_a_list_of_generators_has_one_for_each_image(function, world):
    with pytest.raises(ValueError, match="one entry for each of the 3 samples, got 1"):
        function(world, torch.rand(3, 3), WIDE, generator=[seed(0)], progress=False)


def test_an_int_is_a_seed(rng):
    """One generator for the uniform numbers and then for the directions, in both."""
    x = torch.rand(2, 3, generator=rng)
    schedule = NoiseSchedule.karras(5, 0.05, 6)

    def score(x, sigma):  # not diagonal, so that the directions matter
        return -x - x.roll(1, 1) ** 2

    for function in (log_likelihood, bits_per_dimension):
        found = [function(score, x, schedule, generator=source, progress=False) for source in (3, seed(3), 4)]
        assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
        found = [function(score, x, schedule, generator=source, progress=False) for source in ([3, 4], [seed(3), 4])]
        assert torch.equal(*found)


def test_the_uniform_numbers_are_uniform_in_their_cells():
    """Read from what the score is called with first: within half a step of the grid, and from end to end."""
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


def test_a_condition_is_passed_on():
    conditions = []

    def score(x, sigma, *condition):
        conditions.append(condition)
        return -x

    x, schedule = torch.rand(2, 3), NoiseSchedule([1.0, 0.1])
    for condition in (None, 7, torch.arange(2)):
        likelihood(score, x, schedule, condition=condition)
    assert conditions[0] == () and conditions[3] == (7,) and torch.equal(conditions[6][0], torch.arange(2))
    with torch.inference_mode():
        likelihood(score, x + 0, schedule, condition=torch.zeros(2, 3))
    assert not conditions[-1][0].is_inference()


def test_no_value_is_read_and_no_float64_reaches_a_device():
    """On the meta device, where values cannot be read; a float64 image stays float64 on the CPU only."""
    with NoFloat64(), HostReads() as reads:
        for probes in (1, 2, None):
            x, schedule = torch.empty(2, 3, device="meta"), NoiseSchedule([5.0, 1.0, 0.1])
            found = likelihood(lambda x, sigma: -x, x, schedule, probes=probes, generator=0)
            assert found.shape == (2,) and found.dtype == torch.float32 and found.device.type == "meta"
    assert reads.count == 0
