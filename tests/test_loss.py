"""Training losses against the published numbers, the formulas, and the exact scores of known data."""

import copy
import math
import shutil
import textwrap
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.loss import loss_and_norm, sliced_score_matching_loss
from tests.helpers import HostReads, NoFloat64, in_threads, seed

LEVELS = NoiseSchedule.geometric(3, 0.05, 8)


def zero(x, sigma):
    return torch.zeros_like(x)


class Scaled(nn.Module):
    """A known score times one parameter, whose correct value is 1."""

    def __init__(self, score):
        super().__init__()
        self.score = score
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, sigma):
        return self.factor * self.score(x, sigma)


# -- The published numbers


@pytest.mark.parametrize("case", range(9))
def test_published_values(case, published):
    fixture = published("ncsn_loss")
    case = fixture["cases"][case]
    sigma = fixture["sigmas"][fixture["labels"]]
    losses = dsm_loss(
        lambda x, sigma: case["scores"],
        fixture["samples"],
        sigma=sigma,
        noise=fixture["noise"],
        weighting=lambda sigma: sigma ** case["anneal_power"],
        reduction="none",
    )
    torch.testing.assert_close(losses, case["per_sample_loss_recomputed"], rtol=2e-5, atol=0)
    torch.testing.assert_close(losses.mean(), case["loss_ncsnv2_repo"], rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["flat_2d", "batch1"])
def test_published_values_of_points_and_single_images(name, published):
    fixture = published("ncsn_loss")
    case = fixture[name]
    loss = dsm_loss(zero, case["samples"], sigma=fixture["sigmas"][case["labels"]], noise=case["noise"])
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)


def test_published_value_of_one_level(published):
    case = published("ncsn_loss")["single_sigma_dsm"]
    # The loss of the authors' baseline has no weight.
    loss = dsm_loss(
        lambda x, sigma: -(x - 0.5),
        case["samples"],
        sigma=case["sigma"],
        noise=case["noise"],
        weighting=torch.ones_like,
    )
    torch.testing.assert_close(loss, case["loss"], rtol=1e-4, atol=0)


def test_published_value_of_the_sliced_loss(published):
    fixture = published("ncsn_loss")
    case = fixture["sliced_vr"]
    loss = sliced_score_matching_loss(
        lambda x, sigma: -(x - 0.5) / (1 + sigma.view(-1, 1, 1, 1) ** 2),
        case["samples"],
        sigma=fixture["sigmas"][case["labels"]],
        noise=case["noise"],
        projections=case["projections"],
    )
    torch.testing.assert_close(loss, case["loss"], rtol=2e-5, atol=0)


@pytest.mark.slow
def test_gradients_equal_those_of_the_formula(rng):
    """For a noise-conditional network, against the formula of the loss in double precision."""
    torch.manual_seed(0)
    net = ScoreNet.ncsn(3, 8, width=4).double()
    x = torch.rand(4, 3, 8, 8, generator=rng, dtype=torch.float64)
    z = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    sigma = net.schedule.sigmas[[0, 3, 7, 9]]
    wide = sigma.view(-1, 1, 1, 1)
    target = -((x + wide * z) - x) / wide**2
    expected = (0.5 * ((net(x + wide * z, sigma) - target) ** 2).flatten(1).sum(1) * sigma**2).mean()
    parameters = dict(net.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    loss = dsm_loss(net, x, sigma=sigma, noise=z)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for a, b in zip(torch.autograd.grad(loss, list(parameters.values())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# -- Properties of the loss


def test_the_loss_of_a_zero_score_is_half_the_dimension(rng):
    x = torch.rand(2000, 3, 8, 8, generator=rng)
    losses = dsm_loss(zero, x, LEVELS, generator=rng, reduction="none")
    # Half a chi-square of D degrees: mean D/2, variance D/2.
    assert abs(losses.mean() - 96) < 5 * math.sqrt(96 / 2000)
    assert losses.var() == pytest.approx(96, rel=0.15)


@pytest.mark.parametrize("which", ["world", "mixture"])
def test_the_true_score_minimizes_the_loss(which, request, rng):
    world = request.getfixturevalue(which)
    x = world.sample(200_000, rng)
    z = torch.randn(x.shape, generator=rng)
    sigma = LEVELS.sample(len(x), generator=rng)

    def loss(factor):
        return float(dsm_loss(lambda x, sigma: factor * world(x, sigma), x, sigma=sigma, noise=z))

    assert loss(1.0) < min(loss(0.95), loss(1.05))
    net = Scaled(world)
    losses = dsm_loss(net, x.double(), sigma=sigma, noise=z, reduction="none")
    (gradient,) = torch.autograd.grad(losses.mean(), net.factor)
    # The derivative of each loss by the factor f is (sigma f s + z) . sigma s; at f = 1 its mean is zero, to five
    # standard errors.
    levels = sigma[:, None].double()
    s = levels * world(x.double() + levels * z, sigma)
    deviation = ((s + z) * s).sum(1).std() / math.sqrt(len(x))
    assert abs(gradient) < 5 * deviation


def test_true_score_has_the_closed_form_loss(world, rng):
    x = world.sample(400_000, rng)
    sigma = 0.5
    losses = dsm_loss(world, x, sigma=sigma, generator=rng, reduction="none")
    expected = 0.5 * float((world.values / (world.values + sigma**2)).sum())  # E|sigma s + z|^2 / 2
    assert abs(losses.mean() - expected) < 5 * losses.std() / math.sqrt(len(x))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_the_loss_of_power_p_is_weighted_by_sigma_to_the_p(p, world, rng):
    x = world.sample(5, rng)
    z = torch.randn(x.shape, generator=rng)
    sigma = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0])
    residual = world(x + sigma[:, None] * z, sigma) + z / sigma[:, None]
    expected = residual.abs().pow(p).sum(1) / p * sigma**p
    losses = dsm_loss(world, x, sigma=sigma, noise=z, p=p, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    weighted = dsm_loss(world, x, sigma=sigma, noise=z, p=p, reduction="none", weighting=lambda sigma: 3 * sigma)
    torch.testing.assert_close(weighted, expected / sigma**p * 3 * sigma, rtol=1e-5, atol=1e-6)


def test_the_loss_in_a_region_ignores_other_values_and_is_scaled_by_its_area(rng):
    x, z = torch.rand(3, 2, 4, 4, generator=rng), torch.randn(3, 2, 4, 4, generator=rng)
    arguments = {"sigma": 0.5, "noise": z, "reduction": "none"}
    full = dsm_loss(zero, x, **arguments)
    assert torch.equal(full, dsm_loss(zero, x, mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), **arguments))
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    mask[0, :, :2] = True
    mask[1, :, 1, 1] = True  # the mask of the third image is empty
    losses = dsm_loss(zero, x, mask=mask, **arguments)
    expected = torch.stack(
        [z[0, :, :2].square().sum() / 2 * 2, z[1, :, 1, 1].square().sum() / 2 * 16, torch.tensor(0.0)]
    )
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_area_of_a_region_is_exact_for_half_precision_data(dtype):
    """70,001 values are beyond the range of float16, and are rounded in bfloat16."""
    x = torch.zeros(1, 70_001, dtype=dtype)
    mask = torch.ones(1, 70_001, dtype=torch.bool)
    assert float(loss_and_norm(zero, x, sigma=0.5, noise=torch.ones(1, 70_001), mask=mask)[0]) == 1


@pytest.mark.slow
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), batch=st.integers(1, 5))
@settings(deadline=None)
def test_data_of_any_shape(shape, batch):
    x = torch.rand(batch, *shape)
    z = torch.randn(x.shape)
    losses = dsm_loss(zero, x, sigma=0.3, noise=z, reduction="none")
    torch.testing.assert_close(losses, z.flatten(1).square().sum(1) / 2)
    torch.testing.assert_close(dsm_loss(zero, x, sigma=0.3, noise=z), losses.mean())


def test_a_seed_determines_the_loss_and_leaves_the_global_generator_alone(world, rng):
    x = world.sample(10, rng)
    before = x.clone()
    state = torch.get_rng_state()
    first = dsm_loss(world, x, LEVELS, generator=seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, dsm_loss(world, x, LEVELS, generator=seed(3)))
    assert torch.equal(first, dsm_loss(world, x, LEVELS, generator=3))  # an int is a seed
    assert not torch.equal(first, dsm_loss(world, x, LEVELS, generator=seed(4)))
    sliced = [sliced_score_matching_loss(world, x, LEVELS, generator=source).detach() for source in (3, seed(3), 4)]
    assert torch.equal(sliced[0], sliced[1]) and not torch.equal(sliced[0], sliced[2])
    torch.manual_seed(1)
    second = dsm_loss(world, x, LEVELS)
    torch.manual_seed(1)
    assert torch.equal(second, dsm_loss(world, x, LEVELS))
    assert torch.equal(x, before)


def test_condition_is_passed_on_only_when_given(rng):
    seen = []

    def net(x, sigma, *condition):
        seen.append((sigma.shape, condition))
        return x

    x, label = torch.rand(4, 2, generator=rng), torch.arange(4)
    dsm_loss(net, x, LEVELS)
    dsm_loss(net, x, LEVELS, condition=label)
    dsm_loss(net, x, LEVELS, condition=3)
    assert seen[0] == ((4,), ())
    assert seen[1][1][0] is label
    assert torch.equal(seen[2][1][0], torch.full((4,), 3))


def test_an_int_is_the_class_of_all_samples(rng):
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(6,), layers_per_block=1, classes=3, schedule=LEVELS)
    for parameter in net.parameters():  # some parameters are initialized to zero
        nn.init.normal_(parameter, std=0.1)
    x, fixed = _batch(rng)
    classes = (torch.full((4,), 2), 2, np.int64(2), torch.tensor(2), 1)
    losses = [dsm_loss(net, x, condition=condition, **fixed) for condition in classes]
    assert losses[0] == losses[1] == losses[2] == losses[3] != losses[4]


@pytest.mark.parametrize("loss", [dsm_loss, sliced_score_matching_loss])
def test_a_weight_is_a_number_for_each_noise_level(loss, rng):
    x = torch.rand(4, 3, generator=rng)
    given = {"sigma": torch.tensor([0.1, 0.2, 0.3, 0.4]), "generator": 0, "reduction": "none"}
    ones = loss(lambda x, sigma: -x, x, weighting=torch.ones_like, **given)
    assert torch.equal(loss(lambda x, sigma: -x, x, weighting=lambda sigma: 1.0, **given), ones)
    double = loss(lambda x, sigma: -x, x, weighting=lambda sigma: np.ones(4), **given)
    assert double.dtype == torch.float32 and torch.equal(double, ones)
    with pytest.raises(ValueError, match=r"must return a number for each noise level, \(4,\), got shape \(4, 1\)"):
        loss(lambda x, sigma: -x, x, weighting=lambda sigma: sigma[:, None], **given)


def test_half_precision_data_is_perturbed_in_float32(rng):
    x = torch.rand(4, 3, generator=rng)
    seen = []

    def net(x, sigma):
        seen.append(x.dtype)
        return x

    assert dsm_loss(net, x.bfloat16(), LEVELS).dtype == torch.float32
    assert dsm_loss(net, x.double(), LEVELS).dtype == torch.float64
    assert seen == [torch.float32, torch.float64]


@pytest.mark.parametrize("loss", [dsm_loss, sliced_score_matching_loss])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_dtype_of_the_score_does_not_matter(loss, dtype, rng):
    x = torch.rand(4, 3, generator=rng)
    found = loss(lambda x, sigma: (-x / 2).to(dtype), x, LEVELS, generator=0)
    expected = loss(lambda x, sigma: -x / 2, x, LEVELS, generator=0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_the_networks_own_schedule_is_the_default(rng):
    net = ScoreNet.ncsnv2(1, 8, width=2, schedule=NoiseSchedule([0.7]))
    x = torch.rand(2, 1, 8, 8, generator=rng)
    own = dsm_loss(net, x, generator=seed(0))
    assert torch.equal(own, dsm_loss(net, x, NoiseSchedule([0.7]), generator=seed(0)))
    assert not torch.equal(own, dsm_loss(net, x, NoiseSchedule([0.2]), generator=seed(0)))


# -- Autocast, compilation, function transforms and distributed training


class _Small(nn.Module):
    """A user-defined backbone: two convolutions, with the noise level as a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.level, self.last = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Linear(1, 4),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, x, c_noise):
        return self.last(torch.tanh(self.first(x) + self.level(c_noise[:, None])[..., None, None]))


def _small():
    torch.manual_seed(0)
    return ScoreNet.ncsnv2(1, 8, width=4, schedule=LEVELS, precondition="karras")


def _smallest():
    torch.manual_seed(0)
    return ScoreNet(_Small(), LEVELS, sample_shape=(1, 8, 8))


def _batch(rng):
    x = torch.rand(4, 1, 8, 8, generator=rng)
    return x, {"sigma": torch.tensor([0.1, 0.5, 1.0, 3.0]), "noise": torch.randn(x.shape, generator=rng)}


def test_dsm_loss_under_autocast(rng):
    net, (x, fixed) = _small(), _batch(rng)
    exact = dsm_loss(net, x, **fixed)
    with torch.autocast("cpu", torch.bfloat16):
        loss = dsm_loss(net, x, **fixed)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None
INDUCTOR = pytest.mark.skipif(NO_COMPILER, reason="needs a C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)])
@pytest.mark.filterwarnings("ignore")
def test_dsm_loss_in_a_compiled_function(backend, rng):
    net, (x, fixed) = _smallest(), _batch(rng)
    assert net.value_range == (0, 1)
    options = {"backend": backend, "fullgraph": True}
    loss_of = torch.compile(lambda x, sigma, noise: dsm_loss(net, x, sigma=sigma, noise=noise), **options)
    compiled = loss_of(x, **fixed)  # the network's first batch, whose values a compiled function does not read
    compiled.backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    loss = dsm_loss(net, x, **fixed)
    loss.backward()
    torch.testing.assert_close(compiled, loss, rtol=1e-4, atol=1e-4)
    for p, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=2e-3, atol=2e-3)


def test_per_image_gradients_by_torch_func(rng):
    """With vmap, they equal the gradients of one image at a time."""
    net, (x, fixed) = _small(), _batch(rng)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x, sigma, noise):
        def score(x, sigma):
            return torch.func.functional_call(net, parameters, (x, sigma))

        return dsm_loss(score, x[None], sigma=sigma[None], noise=noise[None])

    per_image = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    found = per_image(parameters, x, fixed["sigma"], fixed["noise"])
    for i in range(len(x)):
        one = dsm_loss(net, x[i : i + 1], sigma=fixed["sigma"][i], noise=fixed["noise"][i : i + 1])
        for name, gradient in zip(parameters, torch.autograd.grad(one, list(net.parameters())), strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-3, atol=1e-3)


def test_accumulated_gradients_equal_those_of_the_whole_batch(rng):
    net, (x, fixed) = _small(), _batch(rng)
    whole = torch.autograd.grad(dsm_loss(net, x, **fixed), list(net.parameters()))
    for half in (slice(0, 2), slice(2, 4)):
        part = dsm_loss(net, x[half], sigma=fixed["sigma"][half], noise=fixed["noise"][half])
        (part / 2).backward()
    for p, gradient in zip(net.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_dsm_loss_under_distributed_data_parallel(forks, tmp_path):
    """Runs in a separate process, since destroying a process group can wait for the interpreter forever."""
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    code = f"""
        import warnings
        import torch
        from torch import nn
        from scorematch import NoiseSchedule, ScoreNet, dsm_loss

        warnings.simplefilter("error", UserWarning)
        torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=0, world_size=1)
        torch.manual_seed(0)
        net = ScoreNet.ncsnv2(1, 8, width=4, schedule=NoiseSchedule.geometric(3, 0.05, 8), precondition="karras")
        x = torch.rand(4, 1, 8, 8)
        fixed = {{"sigma": torch.tensor([0.1, 0.5, 1.0, 3.0]), "noise": torch.randn(x.shape)}}
        expected = torch.autograd.grad(dsm_loss(net, x, **fixed), list(net.parameters()))
        parallel = nn.parallel.DistributedDataParallel(net)
        dsm_loss(parallel, x, **fixed).backward()
        for p, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)
        dsm_loss(parallel, x).backward()  # uses the schedule of the wrapped network
        dsm_loss(parallel, 255 * x).backward()  # no warning: not the first batch of the network
        print("done", flush=True)
    """
    status, printed, error = forks.run(textwrap.dedent(code), tmp_path)
    assert (status, printed) == (0, "done\n"), error


# -- Data in other units


def _warned(net, x, **arguments):
    """The texts of the warnings that ``dsm_loss`` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dsm_loss(net, x, **arguments)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.linspace(-1, 1, 128), "x must be in the network's value_range, (0.0, 1.0), got values from -1 to 1."),
        (torch.linspace(0, 255, 128), "x must be in the network's value_range, (0.0, 1.0), got values from 0 to 255."),
        (torch.full((128,), math.nan), "x must be in the network's value_range, (0.0, 1.0), got NaN."),
        (torch.full((128,), math.inf), "x must be in the network's value_range, (0.0, 1.0), got values from inf to"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel], ids=["net", "wrapped"])
def test_data_in_other_units_give_one_warning(x, message, wrap):
    net = wrap(_smallest())
    (warning,) = _warned(net, x.view(2, 1, 8, 8))
    assert warning.startswith(message)
    assert "(x + 1) / 2" in warning and "x / 255" in warning and "net.value_range = (low, high)" in warning
    assert _warned(net, x.view(2, 1, 8, 8)) == []
    assert _warned(getattr(net, "module", net), x.view(2, 1, 8, 8)) == []


def test_the_warning_names_the_line_of_the_caller():
    with pytest.warns(UserWarning, match="value_range") as caught:
        dsm_loss(_smallest(), torch.full((2, 1, 8, 8), 2.0))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="value_range") as caught:
        sliced_score_matching_loss(_smallest(), torch.full((2, 1, 8, 8), 2.0))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("x", [torch.linspace(-300, 500, 128), torch.linspace(0.001, 0.002, 128)])
def test_data_of_another_scale_than_the_preconditioning_expects_give_one_warning(x):
    """Without a value range, "karras" takes the data as they are."""
    x = x.view(2, 1, 8, 8)
    net = ScoreNet(_Small(), LEVELS)
    (warning,) = _warned(net, x)
    assert warning.startswith(
        "the network expects data with a mean near 0 and a standard deviation near 0.5, got values "
    )
    assert "Call net.fit_units(data) before the training" in warning and _warned(net, x) == []
    fitting = ScoreNet(_Small(), LEVELS, precondition_options={"sigma_data": x.square().mean().sqrt().item()})
    assert _warned(fitting, x) == []


def test_data_of_the_expected_scale_give_no_warning(rng):
    x = torch.rand(2, 1, 8, 8, generator=rng)
    assert _warned(_smallest(), x * 1.15 - 0.075) == []  # as after a bicubic resize
    assert _warned(zero, 255 * x, schedule=LEVELS) == []
    net = ScoreNet(_Small(), LEVELS, sample_shape=(1, 8, 8), value_range=(-1, 1))
    assert _warned(net, 2 * x - 1) == []
    points = ScoreNet(_Small(), LEVELS)
    assert points.value_range is None and _warned(points, 4 * x) == _warned(ScoreNet(_Small(), LEVELS), 0 * x) == []
    other = ScoreNet(_Small(), LEVELS, precondition="ncsnpp")
    assert other.value_range is None and _warned(other, 255 * x) == []


def test_only_the_first_batch_is_compared_with_the_value_range(rng):
    """Later batches are not read. A copy of the network counts as another network."""
    net, x = _smallest(), torch.rand(2, 1, 8, 8, generator=rng)
    fixed = {"sigma": torch.full((2,), 0.5, device="cpu"), "noise": torch.zeros_like(x)}
    with HostReads() as first:
        dsm_loss(net, x, **fixed)
    with HostReads() as later:
        dsm_loss(net, 255 * x, **fixed)
    assert first.count == later.count + 2  # the smallest and the largest value
    assert len(_warned(copy.deepcopy(net), 255 * x)) == 1


def test_the_first_batch_with_readable_values_is_compared_with_the_value_range(rng):
    """Under vmap and on the meta device values cannot be read; the comparison is made with a later batch."""
    net, x = _smallest(), torch.rand(2, 1, 8, 8, generator=rng)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.vmap(lambda x: dsm_loss(net, x[None], sigma=0.5, noise=torch.zeros(1, 1, 8, 8)))(255 * x)
        dsm_loss(copy.deepcopy(net).to("meta"), torch.empty(2, 1, 8, 8, device="meta"))
    assert len(_warned(net, 255 * x)) == 1


def test_many_threads_warn_once():
    net, x = _smallest(), torch.full((2, 1, 8, 8), 255.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_threads([partial(dsm_loss, net, x)] * 8)
    assert sum("value_range" in str(warning.message) for warning in caught) == 1


def test_no_float64_reaches_a_device():
    x = torch.empty(3, 2, 4, 4, device="meta")
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    net = _small().to("meta")
    with NoFloat64():
        for sigma in (None, 0.5, torch.tensor(0.5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)):
            for loss in (dsm_loss, sliced_score_matching_loss):
                noise = torch.zeros(x.shape, dtype=torch.float64)
                found = loss(lambda x, sigma: -x / sigma.view(-1, 1, 1, 1), x, LEVELS, sigma=sigma, noise=noise)
                assert found.dtype == torch.float32 and found.device.type == "meta"
        dsm_loss(net, x[:, :1].expand(-1, 1, -1, -1), mask=mask, generator=0).backward()


# -- Sliced score matching


def test_sliced_loss_has_the_expectation_of_explicit_score_matching(world, rng):
    """E[v' J v + |s|^2 / 2] = tr J + |s|^2 / 2; for a Gaussian its mean is -sum_i 1 / (values_i + sigma^2) / 2."""
    x = world.sample(200_000, rng)
    sigma = 0.4
    losses = sliced_score_matching_loss(world, x, sigma=sigma, generator=rng, reduction="none")
    expected = -0.5 * float((1 / (world.values + sigma**2)).sum()) * sigma**2
    assert abs(losses.mean() - expected) < 5 * losses.std() / math.sqrt(len(x))


def test_the_true_score_minimizes_the_sliced_loss(mixture, rng):
    x = mixture.sample(100_000, rng)
    fixed = {"sigma": 0.3, "noise": torch.randn(x.shape, generator=rng), "projections": torch.randn(x.shape)}

    def loss(factor):
        return float(sliced_score_matching_loss(lambda x, sigma: factor * mixture(x, sigma), x, **fixed).detach())

    assert loss(1.0) < min(loss(0.9), loss(1.1))


@pytest.mark.slow
def test_sliced_loss_gives_every_parameter_a_gradient(rng):
    net, (x, fixed) = _small(), _batch(rng)
    value = sliced_score_matching_loss(net, x, **fixed, generator=0)
    for mode in (torch.no_grad, torch.inference_mode):  # as in validation loops
        with mode():
            again = sliced_score_matching_loss(net, x + 0, **fixed, generator=0)
        assert not again.requires_grad and torch.equal(again, value)
    loss = sliced_score_matching_loss(net, x, LEVELS, generator=rng)
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("options", [{"classes": 3}, {"condition_channels": 1}, {}], ids=str)
def test_sliced_loss_of_a_network_with_attention_and_a_condition(rng, options):
    """The gradient is that of finite differences of the loss, in float64."""
    net = ScoreNet.unet(1, 8, widths=(4,), **options).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2, generator=rng)
    x, z, v = (torch.randn(2, 1, 8, 8, generator=rng).double() for _ in range(3))
    net.value_range = None
    condition = {"classes": torch.tensor([0, 2]), "condition_channels": z}.get(next(iter(options), ""))

    def loss():
        return sliced_score_matching_loss(net, x, sigma=0.5, noise=z, projections=v, condition=condition)

    loss().backward()
    with torch.inference_mode():
        x, z, v = x + 0, z + 0, v + 0
        condition = None if condition is None else condition + 0
        assert loss().isfinite()
    weight = net.backbone.mid_block.attentions[0].to_q.weight
    along = torch.randn(weight.shape, generator=rng).double()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * along
            values.append(loss().item())
            weight -= step * along
    assert weight.grad.abs().max() > 0
    assert (weight.grad * along).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


# -- Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "pass a schedule, or sigma"),
        ({"sigma": torch.tensor([1, 2])}, TypeError, "sigma must be a floating-point noise level.*Write schedule"),
        ({"sigma": 1.0, "generator": "0"}, TypeError, "torch.Generator or a seed, got '0'"),
        ({"sigma": 0.0}, ValueError, "sigma must be positive, got 0"),
        ({"sigma": -1.0}, ValueError, "sigma must be positive, got -1"),
        ({"sigma": float("nan")}, ValueError, "sigma must be positive, got nan"),
        ({"sigma": torch.tensor([1.0, -2.0])}, ValueError, "sigma must be positive, got -2"),
        ({"sigma": torch.ones(3)}, ValueError, r"or \(2,\) like the batch, got shape \(3,\)"),
        ({"sigma": 1.0, "noise": torch.zeros(2, 4)}, ValueError, r"noise must have the shape of x, \(2, 3\)"),
        ({"sigma": 1.0, "p": 0}, ValueError, "p must be at least 1, got 0"),
        ({"sigma": 1.0, "p": float("nan")}, ValueError, "p must be at least 1, got nan"),
        ({"sigma": 1.0, "p": float("inf")}, ValueError, "p must be finite, got inf"),
        ({"sigma": 1.0, "reduction": "sum"}, ValueError, "reduction must be one of 'mean', 'none', got 'sum'"),
        ({"sigma": 1.0, "noise": torch.zeros(2, 3).numpy()}, TypeError, "noise must be a tensor, got ndarray"),
        (
            {"sigma": 1.0, "mask": (torch.ones(2, 3) > 0).numpy()},
            TypeError,
            r"mask must be a bool tensor, .*got ndarray. Write torch.as_tensor\(mask\)",
        ),
        ({"sigma": 1.0, "mask": torch.ones(2, 3)}, TypeError, "mask must be bool.*Write mask > 0.5"),
        ({"sigma": 1.0, "mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask must be broadcastable to x"),
    ],
)
def test_invalid_arguments_raise(arguments, error, message):
    with pytest.raises(error, match=message):
        dsm_loss(zero, torch.zeros(2, 3), **arguments)


def test_invalid_data_and_network_outputs_raise():
    with pytest.raises(TypeError, match="Write x / 255"):
        dsm_loss(zero, torch.zeros(2, 3, dtype=torch.uint8), LEVELS)
    with pytest.raises(ValueError, match=r"a batch \(N, ...\) with at least one sample, got shape \(3,\)"):
        dsm_loss(zero, torch.zeros(3), LEVELS)
    for output, name in (((torch.zeros(2, 3),), "tuple"), (None, "NoneType")):
        message = rf"returned {name}, but a score must be a tensor of the shape of x, \(2, 3\)"
        with pytest.raises(TypeError, match=message):
            dsm_loss(lambda x, sigma, output=output: output, torch.zeros(2, 3), LEVELS)
    with pytest.raises(ValueError, match="score must be differentiable in x"):
        sliced_score_matching_loss(lambda x, sigma: -x.detach(), torch.zeros(2, 3), LEVELS)
    with pytest.raises(ValueError, match=r"returned shape \(2,\) for x of shape \(2, 3\)"):
        dsm_loss(lambda x, sigma: x[:, 0], torch.zeros(2, 3), LEVELS)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for x of shape \(2, 3\)"):  # not broadcast
        dsm_loss(lambda x, sigma: x[:, :1], torch.zeros(2, 3), LEVELS)
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\) for x of shape \(2, 3\)"):
        sliced_score_matching_loss(lambda x, sigma: x[:, :1], torch.zeros(2, 3), LEVELS)
    with pytest.raises(ValueError, match=r"at least one sample, got shape \(0, 3\)"):
        dsm_loss(zero, torch.zeros(0, 3), LEVELS)
    with pytest.raises(TypeError, match=r"got list. A batch of a data set with labels is \[x, y\]"):
        dsm_loss(zero, [torch.zeros(2, 3), torch.zeros(2)], LEVELS)
    with pytest.raises(TypeError, match=r"got ndarray. Write torch.as_tensor\(x\)"):
        dsm_loss(zero, torch.zeros(2, 3).numpy(), LEVELS)
    with pytest.raises(ValueError, match="projections must have the shape"):
        sliced_score_matching_loss(zero, torch.zeros(2, 3), LEVELS, projections=torch.zeros(1))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'none'"):
        sliced_score_matching_loss(zero, torch.zeros(2, 3), LEVELS, reduction="sum")
