"""Data with a mean and a standard deviation for each channel, in their own units."""

import copy
import functools
import json
from functools import partial

import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.scores import NetworkScore
from scorematch.evaluation import level_losses
from scorematch.evaluation.exact import Gaussian
from scorematch.likelihood import log_likelihood
from scorematch.loss import sliced_score_matching_loss
from scorematch.nets.precondition import ROWS, Preconditioning, Units
from scorematch.restoration import Linear, Mask, Observation
from scorematch.restoration.methods import METHODS
from scorematch.sampling import (
    AncestralSampler,
    DecoupledSampler,
    ODESampler,
    ParticleSampler,
    learned_settings,
    schedules_of_paths,
)
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


@functools.cache
def trained_in_units(row):
    """A network that is trained in the units of the data, the same one in standard units, their mean and deviation."""
    x, own, standard = fields(), network(row), network(row)
    own.fit_units(x)
    mean, std = (torch.tensor(part)[:, None, None] for part in own.units[:2])
    standard.schedule = NoiseSchedule(own.schedule.sigmas / (2 * own.units.typical))
    return trained(own, x), trained(standard, (x - mean) / (2 * std)), mean, std


@pytest.mark.parametrize(
    ("row", "sampler"),
    [
        pytest.param(row, sampler, marks=pytest.mark.slow if row != "karras" and sampler is not ODESampler else ())
        for row in ("karras", "vp", "flow")
        for sampler in (AnnealedLangevinSampler, AncestralSampler, ODESampler)
    ],
)
def test_training_and_sampling_in_units_is_that_in_standard_units(row, sampler):
    """The standard units have mean 0 and standard deviation 0.5; the channels differ by a factor of 60."""
    own, standard, mean, std = trained_in_units(row)
    y = sampler(own, levels=5, precision="float32").sample(4, generator=0, progress=False)
    expected = sampler(standard, levels=5, precision="float32").sample(4, generator=0, progress=False)
    assert torch.allclose((y - mean) / (2 * std), expected, atol=1e-3)


def test_fit_units_measures_each_channel_and_scales_the_levels():
    net, x = network(), fields()
    net.fit_units(x)
    assert torch.allclose(torch.tensor(net.units.mean), MEAN, rtol=1e-5)
    assert torch.allclose(torch.tensor(net.units.std), STD, rtol=1e-5)
    typical = (30 * 0.5) ** 0.5
    assert net.units.ratios == pytest.approx((30 / typical, 0.5 / typical), rel=1e-5)
    levels = (net.schedule.sigma_max, net.schedule.sigma_min)
    assert levels == pytest.approx((50 * typical / 0.5, 0.01 * typical / 0.5), rel=1e-5)
    net.fit_units(x)
    assert (net.schedule.sigma_max, net.schedule.sigma_min) == pytest.approx(levels)


@pytest.mark.parametrize("levels", [(80.0, 9.0, 0.5, 0.002), (1.5,)])
def test_fit_units_keeps_the_ratios_of_the_levels(levels):
    net = ScoreNet(nn.Identity(), NoiseSchedule(levels), sample_shape=SHAPE, value_range=None)
    net.fit_units(fields())
    assert torch.allclose(net.schedule.sigmas / net.schedule.sigma_max, torch.tensor(levels).double() / levels[0])


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


@pytest.mark.slow
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


def points():
    """A network of vectors whose values differ by orders of magnitude, that of standard units, and the units."""
    torch.manual_seed(0)
    standard = ScoreNet.mlp(3, width=8, depth=1)
    nn.init.normal_(standard.backbone.linear_out.weight, std=0.3)
    standard.value_range, standard.schedule = None, NoiseSchedule.geometric(10, 0.02, 20)
    standard.precondition_options = {"sigma_data": 0.5}
    own = copy.deepcopy(standard)
    own.units = Units((250.0, 0.01, 0.0), (30.0, 0.002, 4.0), relative=True)
    own.schedule = NoiseSchedule(standard.schedule.sigmas * 2 * own.units.typical)
    return own.eval(), standard.eval(), *(torch.tensor(part) for part in own.units[:2])


def test_denoised_data_likelihoods_and_losses_in_units_are_those_in_standard_units():
    own, standard, mean, std = points()
    u, scale = torch.randn(4, 3, generator=seed()) / 2, 2 * own.units.typical
    x, noise = mean + 2 * std * u, torch.randn(4, 3, generator=seed(1))
    assert torch.allclose((own.denoise(x, 0.3 * scale) - mean) / (2 * std), standard.denoise(u, 0.3), atol=1e-4)
    found, expected = (
        log_likelihood(net, each, net.schedule.respaced(8), probes=None, progress=False)
        for net, each in ((own, x), (standard, u))
    )
    assert torch.allclose(found + (2 * std).log().sum(), expected, atol=2e-3)
    for loss in (dsm_loss, partial(sliced_score_matching_loss, projections=noise.flip(0))):
        losses = [loss(net, each, sigma=s, noise=noise) for net, each, s in ((own, x, 0.3 * scale), (standard, u, 0.3))]
        assert torch.allclose(*losses, rtol=1e-3)


def test_the_error_of_denoised_data_is_in_the_units_of_the_data():
    own, _, mean, std = points()
    x, sigma = mean + 2 * std * torch.randn(200, 3, generator=seed()), 0.3 * own.units.typical
    (row,) = level_losses(own, x, [sigma], n=None, progress=False)
    noise = sigma * own.units.noise(x) * torch.randn(200, 3, generator=seed(1))
    expected = (own.denoise(x + noise, sigma) - x).square().mean().sqrt().item()
    assert row.denoised == pytest.approx(expected, rel=0.2)


def test_levels_and_learned_steps_in_units_are_those_in_standard_units():
    own, standard, *_ = points()
    chosen, learned = [], []
    for net, scale in ((own, 2 * own.units.typical), (standard, 1)):
        (schedule,) = schedules_of_paths(net, [4], net.schedule, n=8, generator=0, progress=False)
        chosen.append([sigma / scale for sigma in schedule])
        (found,) = learned_settings(net, [3], net.schedule, n=4, iterations=2, progress=False)
        learned.append([*found.options["coefficients"], *(sigma / scale for sigma in found.options["sigmas"])])
    assert chosen[0] == pytest.approx(chosen[1], rel=1e-5)
    assert learned[0] == pytest.approx(learned[1], rel=0.01, abs=1e-3)


RESTORING = {
    **{name: partial(ODESampler, restore=name, method="dpm-solver++", eta=1) for name in METHODS},
    "stay": partial(AnnealedLangevinSampler, restore="replace"),
    "particles": lambda net, particles=4, **options: ParticleSampler(net, particles=particles, **options),
    "decoupled": DecoupledSampler,
}


@pytest.mark.parametrize("name", RESTORING)
def test_posteriors_in_units_are_those_in_standard_units(name):
    """Also if A mixes the values."""
    own, standard, mean, std = points()
    u, sigma = torch.randn(1, 3, generator=seed()), torch.tensor([6.0, 0.0, 8.0])
    seen = Mask(torch.tensor([True, True, False]))
    for operator in (seen, Linear(lambda x: x[:, :1])):
        y, noise = operator.measure(mean + 2 * std * u), sigma[: operator.measure(u).shape[1]]
        in_units = Observation(operator, y, noise)
        scale = operator.measure((2 * std)[None]) + (operator.measure(std[None]) == 0)
        in_standard = Observation(operator, operator.measure(u), noise / scale)
        options = {"levels": 5, "precision": "float32"}
        x, expected = (
            RESTORING[name](net, **options).sample(3, observation=each, generator=0, progress=False)
            for net, each in ((own, in_units), (standard, in_standard))
        )
        assert torch.allclose((x - mean) / (2 * std), expected, atol=2e-3, rtol=2e-3), name


def test_the_evidence_in_units_is_that_in_standard_units_divided_by_the_units_of_y():
    own, standard, mean, std = points()
    u, all_but_one = torch.randn(1, 3, generator=seed()), Mask(torch.tensor([True, True, False]))
    for operator in (all_but_one, Linear(lambda x: x[:, :1] + 10000 * x[:, 1:2])):
        y = operator.measure(mean + 2 * std * u)
        whole = Linear(lambda u, operator=operator: operator.measure(2 * std * u))
        if operator is all_but_one:
            scale = operator.measure((2 * std)[None])[:, :2]
            noise = torch.tensor([[6.0, 0.001, torch.inf]])
            in_standard = Observation(operator, operator.measure(u), noise / (2 * std))
        else:
            scale, noise = torch.ones(1, 1), torch.tensor([[6.0]])
            in_standard = Observation(whole, whole.measure(u), noise)
        found, expected = (
            ParticleSampler(net, particles=4, levels=5, precision="float32")
            .population(each, 3, generator=0, progress=False)
            .log_evidence
            for net, each in ((own, Observation(operator, y, noise)), (standard, in_standard))
        )
        assert torch.allclose(found + scale.log().sum(), expected, atol=2e-3)


class Known(NetworkScore):
    """The score of normal signals whose noise is relative to the deviation of each channel."""

    predicts_variance = False

    def __init__(self, mean, covariance, shape):
        std = covariance.diag().view(shape).mean(1).sqrt()
        self.units = Units(tuple(mean.view(shape).mean(1).tolist()), tuple(std.tolist()), relative=True)
        self.schedule = NoiseSchedule.geometric(100 * self.units.typical, 0.005 * self.units.typical, 100)
        self.preconditioning = Preconditioning("karras", self.schedule, None, data=self.units)
        self.sample_shape, self.r = shape, torch.tensor(self.units.ratios)[:, None]
        r = self.r.expand(shape).flatten()
        self.inner = Gaussian(mean / r, covariance / r / r[:, None], shape)

    def definition(self):
        return []

    def _outputs(self, x, sigma, condition, *, variance=False):
        return (self.inner(x / self.r, torch.as_tensor(sigma)) / self.r,)

    def __call__(self, x, sigma, condition=None):
        return self._outputs(x, sigma, condition)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RESTORING if name != "replace"])  # "stay" is the same method
def test_posteriors_of_channels_with_very_different_deviations_agree_with_the_closed_form(name):
    """The deviations are 30 and 0.002; of the methods, two are exact only for independent values."""
    shape, std = (2, 4), torch.tensor([30.0, 0.002]).repeat_interleave(4)
    a = torch.randn(8, 8, generator=seed(1)) / 8**0.5
    covariance = a @ a.T + 0.3 * torch.eye(8)
    covariance = covariance / covariance.diag().sqrt() / covariance.diag().sqrt()[:, None] * std * std[:, None]
    exact = Gaussian(torch.tensor([250.0, 0.01]).repeat_interleave(4), covariance, shape)
    net, truth = Known(exact.mean.float(), covariance, shape), exact.sample(1, 5).float()
    mask, noise = Mask(torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool()), torch.tensor([[10.0], [0.001]])
    cases = [(mask, noise), (Linear(lambda x: x.sum(1)), 10.0)]
    for operator, sigma in cases if name in ("moment-matching", "decoupled") else cases[:1]:
        y = operator.measure(truth)
        observation = Observation(operator, y + sigma * torch.randn(y.shape, generator=seed(3)), sigma)
        posterior = exact.posterior(observation)
        sampler = RESTORING[name](net, levels=30, **({"particles": 16} if name == "particles" else {}))
        x = sampler.sample(200, observation=observation, generator=0, progress=False).double().flatten(1)
        z = (x - posterior.mean.flatten()) / posterior.covariance.diag().sqrt()
        most = 0.3 if name in ("guide", "guide-jacobian", "stay") else 0.2  # the standard error is 0.07
        assert z.mean(0).square().mean().sqrt() < most
        assert z.std(0).min() > 0.8 and z.std(0).max() < 1.2


@pytest.mark.slow
def test_an_observation_is_in_the_units_of_the_data():
    net = network()
    net.fit_units(fields())
    y = fields()[:1, :, :4]
    observation = Observation(Linear(lambda x: x[:, :, :4]), y, 0.01)
    x = ODESampler(net, restore="guide-jacobian").sample(2, observation=observation, generator=0, progress=False)
    assert (x[:, :, :4] - y).square().mean((0, 2, 3)).sqrt().lt(STD).all()


def test_the_weights_of_the_loss_are_those_of_each_channel():
    net, x = network(), fields(4)
    net.units = Units(tuple(MEAN.tolist()), tuple(STD.tolist()))  # of older networks, with the same noise everywhere
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
    assert copy.units == net.units
    assert ((copy.denoise(x, 3.0) - net.denoise(x, 3.0)).abs().amax((0, 2, 3)) < 0.1 * STD).all()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "units": {"mean": [0], "std": [1, -1]}}))
    with pytest.raises(ValueError, match=f"{tmp_path}.*a positive standard deviation for each channel"):
        ScoreNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network().fit_units(torch.ones(4, 2, 8, 8)), "channel 0 of data is constant. Leave it out"),
        (
            lambda: network().fit_units(1e-30 * fields()),
            r"deviation from 1e-12 to 1e\+09, got .* such as x / [1-9]e-[12]",
        ),
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


@pytest.mark.parametrize("data", [fields().numpy(), [[1.0, 2.0]], None])
def test_only_tensors_and_opened_arrays_are_measured(data):
    with pytest.raises(TypeError, match=r"the result of open_arrays, got .* Write torch.as_tensor\(data\)"):
        network().fit_units(data)


def test_data_of_another_number_of_channels_raise():
    net = network()
    net.units = Units((0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"x must have 1 channels, like the data, got shape \(1, 2, 8, 8\)"):
        net(torch.rand(1, *SHAPE), 0.3)
