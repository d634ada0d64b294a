"""Data with a mean and a standard deviation for each channel, in their own units."""

import json

import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.evaluation.exact import Gaussian
from scorematch.nets.precondition import ROWS, Units
from scorematch.restoration import Linear, Observation
from scorematch.sampling import AncestralSampler, ODESampler
from scorematch.training.levels import weighting_for
from tests.helpers import seed

SHAPE = (2, 8, 8)
MEAN, STD = torch.tensor([250.0, -3.0]), torch.tensor([30.0, 0.5])


def fields(n=16, number=0):
    """Smooth fields with these means and standard deviations of the channels."""
    x = torch.randn(n, *SHAPE, generator=seed(number)).cumsum(-1).cumsum(-2)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std * STD[:, None, None] + MEAN[:, None, None]


def network(precondition="karras", channels=2):
    torch.manual_seed(0)
    net = ScoreNet.unet(channels, 8, widths=(8, 8), layers_per_block=1, precondition=precondition)
    net.value_range = None
    return net


def trained(net, x):
    """After three steps on x."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        loss = dsm_loss(net, x, weighting=weighting_for(net, None, 2), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("sampler", [AnnealedLangevinSampler, AncestralSampler, ODESampler])
@pytest.mark.parametrize("row", ["karras", "vp", "flow"])
def test_training_and_sampling_in_units_is_that_in_standard_units(row, sampler):
    """For one standard deviation; the standard units have mean 0 and standard deviation 0.5."""
    x = fields()[:, :1]
    own = network(row, 1)
    own.fit_units(x)
    (mean,), (std,) = own.units
    standard = network(row, 1)
    standard.schedule = NoiseSchedule(own.schedule.sigmas / (2 * std))
    trained(own, x)
    trained(standard, (x - mean) / (2 * std))
    y = sampler(own, levels=5, precision="float32").sample(4, generator=0, progress=False)
    expected = sampler(standard, levels=5, precision="float32").sample(4, generator=0, progress=False)
    assert torch.allclose((y - mean) / (2 * std), expected, atol=1e-3)


def test_fit_units_measures_each_channel_and_scales_the_levels():
    net, x = network(), fields()
    net.fit_units(x)
    assert torch.allclose(torch.tensor(net.units.mean), MEAN, rtol=1e-5)
    assert torch.allclose(torch.tensor(net.units.std), STD, rtol=1e-5)
    assert net.schedule.sigma_max == pytest.approx(50 * 30 / 0.5) and net.schedule.sigma_min == pytest.approx(0.01)
    again = net.schedule
    net.fit_units(x)
    assert net.schedule.sigma_max == pytest.approx(again.sigma_max * 30 / (30 * 0.5) ** 0.5)


@pytest.mark.parametrize("row", sorted(name for name, row in ROWS.items() if row.centered))
def test_the_coefficients_of_each_channel_are_those_of_its_own_standard_units(row):
    net, x = network(row), fields(3)
    net.units = Units(tuple(MEAN.tolist()), tuple(STD.tolist()))
    sigma = torch.tensor([0.1, 2.0, 40.0])
    found = net.preconditioning.coefficients(sigma)
    for c in range(2):
        one = network(row, 1)
        one.units = Units((float(MEAN[c]),), (float(STD[c]),))
        expected = one.preconditioning.coefficients(sigma)
        for name in ("c_in", "c_skip", "c_out"):
            own, other = (torch.as_tensor(getattr(each, name)) for each in (found, expected))
            assert own.ndim == 0 or torch.allclose(own[:, c], other[:, 0])
    assert net(x, sigma).shape == x.shape and net(x, 0.3).isfinite().all()


def test_a_backbone_of_zero_is_the_score_of_independent_normal_values_with_these_moments():
    net = network()  # its last convolution is zero
    net.units = Units(tuple(MEAN.tolist()), tuple(STD.tolist()))
    variance = STD.square()[:, None, None].expand(SHAPE).flatten()
    exact = Gaussian(MEAN[:, None, None].expand(SHAPE).flatten(), torch.diag(variance), SHAPE)
    x, sigma = fields(4), torch.tensor([0.1, 1.0, 10.0, 100.0])
    assert torch.allclose(net(x, sigma), exact(x, sigma), rtol=1e-4, atol=1e-6)
    net.schedule = NoiseSchedule.geometric(3000, 0.01, 200)
    y = ODESampler(net, levels=40).sample(64, generator=0, progress=False)
    assert torch.allclose((y.mean((0, 2, 3)) - MEAN) / STD, torch.zeros(2), atol=4 / 64)
    assert torch.allclose(y.std((0, 2, 3)), STD, rtol=0.05)


def test_an_observation_is_in_the_units_of_the_data():
    net = network()
    net.fit_units(fields())
    y = fields()[:1, :, :4]
    observation = Observation(Linear(lambda x: x[:, :, :4]), y, 0.01)
    x = ODESampler(net, restore="guide-jacobian").sample(2, observation=observation, generator=0, progress=False)
    assert (x[:, :, :4] - y).square().mean((0, 2, 3)).sqrt().lt(STD).all()


def test_the_weights_of_the_loss_are_those_of_each_channel():
    net, x = network(), fields(4)
    net.fit_units(x)
    sigma, noise = torch.tensor([0.1, 1.0, 10.0, 100.0]), torch.randn(4, *SHAPE, generator=seed())
    weights = weighting_for(net, "backbone", 2)(sigma)
    assert weights.shape == (4, 2)
    loss = dsm_loss(net, x, sigma=sigma, noise=noise, weighting=lambda sigma: weights, reduction="none")
    score = net(x + sigma.view(-1, 1, 1, 1) * noise, sigma)
    residual = (score + noise / sigma.view(-1, 1, 1, 1)).square().sum((2, 3))
    assert torch.allclose(loss, (residual * weights).sum(1) / 2, rtol=1e-4)


def test_units_are_saved_and_kept_by_copies(tmp_path):
    net, x = network(), fields(2)
    net.fit_units(x)
    nn.init.normal_(net.backbone.conv_out.weight)
    net.eval().save_pretrained(tmp_path)
    loaded = ScoreNet.from_pretrained(tmp_path)
    assert loaded.units == net.units and torch.equal(loaded(x, 3.0), net(x, 3.0))
    copy = net.inference_copy()
    assert copy.units == net.units and torch.allclose(copy(x, 3.0), net(x, 3.0), rtol=0.1, atol=0.01)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "units": {"mean": [0], "std": [1, -1]}}))
    with pytest.raises(ValueError, match=f"{tmp_path}.*a positive standard deviation for each channel"):
        ScoreNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network().fit_units(torch.ones(4, 2, 8, 8)), "channel 0 of data is constant. Leave it out"),
        (lambda: network().fit_units(fields() / 0), r"but 16 of 16 samples have NaN or infinite .* \[0, 0, 0, 0\]"),
        (
            lambda: network().fit_units(torch.rand(4, 2, 8)),
            r"samples like those of the network, \(2, 8, 8\), got \(2, 8\)",
        ),
        (lambda: setattr(network("ncsnv2"), "units", Units((0,), (1,))), "units need a preconditioning such as"),
        (lambda: setattr(network(), "units", Units((0, 1), (1,))), "a mean and a positive standard deviation for each"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_not_measured():
    with pytest.raises(TypeError, match=r"data must be floating point, got torch.int64. Write data.float\(\)"):
        network().fit_units(torch.arange(256).view(2, 2, 8, 8))


def test_data_of_another_number_of_channels_raise():
    net = network()
    net.units = Units((0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"x must have 1 channels, like the data, got shape \(1, 2, 8, 8\)"):
        net(torch.rand(1, *SHAPE), 0.3)
