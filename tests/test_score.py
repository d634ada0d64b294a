"""ScoreNet: the preconditioning table, all forms of the arguments, and errors for invalid ones."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet, dsm_loss
from scorematch.core.conditions import Condition
from scorematch.nets import RefineNet
from scorematch.nets.unet import UNet
from scorematch.pretrained import cards
from scorematch.sampling import SamplerSettings, recommended_sampler
from tests.helpers import on_meta, run

LEVELS = NoiseSchedule.geometric(10, 0.01, 30)


class Backbone(nn.Module):
    """A function as a backbone, with one parameter whose dtype is that of the backbone."""

    def __init__(self, function, dtype=torch.float64):
        super().__init__()
        self.function = function
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x, c_noise, *condition):
        return self.function(x, c_noise, *condition)


def _wide(t):
    return t.view(-1, 1, 1, 1)


# -- The preconditioning table: the exact backbone for Gaussian data gives the exact score of images in [0, 1]

MEAN, DEVIATION = 0.3, 0.2  # of the data, in [0, 1]


def _exact(x, sigma):
    return -(x - MEAN) / (DEVIATION**2 + sigma**2)


def _ncsn(x, position):  # the raw output is the score
    sigma = 10 * (0.01 / 10) ** (position / 29)
    return _exact(x, _wide(sigma))


def _ncsnv2(x, sigma):  # sigma times the score
    return _wide(sigma) * _exact(x, _wide(sigma))


def _karras(v, c_noise):
    """Karras et al. 2022, Eq. 7 solved for F, in [-1, 1]: D = c_skip u + c_out F(c_in u)."""
    s, data = torch.exp(4 * _wide(c_noise)), 0.5
    u = v * (s**2 + data**2).sqrt()
    mean, deviation = 2 * MEAN - 1, 2 * DEVIATION
    denoised = (deviation**2 * u + s**2 * mean) / (deviation**2 + s**2)
    return (denoised - data**2 / (s**2 + data**2) * u) / (s * data / (s**2 + data**2).sqrt())


@pytest.mark.parametrize(("row", "function"), [("ncsn", _ncsn), ("ncsnv2", _ncsnv2), ("karras", _karras)])
def test_exact_backbones_give_the_exact_score(row, function, rng):
    net = ScoreNet(Backbone(function), LEVELS, precondition=row, sample_shape=(1, 3, 5))
    x = torch.rand(4, 1, 3, 5, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([10.0, 1.0, 0.07, 0.01], dtype=torch.float64)
    torch.testing.assert_close(net(x, sigma), _exact(x, _wide(sigma)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net(x, 0.3), _exact(x, 0.3), rtol=1e-9, atol=1e-9)
    posterior = (DEVIATION**2 * x + 0.09 * MEAN) / (DEVIATION**2 + 0.09)
    torch.testing.assert_close(net.denoise(x, 0.3), posterior, rtol=1e-9, atol=1e-9)


def test_karras_without_a_value_range_does_not_rescale_the_data(rng):
    """A backbone of zeros is the exact score of N(0, 1/4) without a value range, and of N(1/2, 1/16) for images."""
    x = torch.randn(5, 2, generator=rng)
    points = ScoreNet(Backbone(lambda x, c: 0 * x), LEVELS)
    torch.testing.assert_close(points(x, 0.3), -x / (0.25 + 0.09))
    images = ScoreNet(Backbone(lambda x, c: 0 * x), LEVELS, value_range=(0, 1))
    torch.testing.assert_close(images(x, 0.3), -(x - 0.5) / (1 / 16 + 0.09))


def test_karras_input_and_target_have_unit_variance(rng):
    seen = {}

    def function(x, c_noise):
        seen["x"] = x
        return torch.zeros_like(x)

    net = ScoreNet(Backbone(function, torch.float32), LEVELS, sample_shape=(1, 32, 32))
    clean = 0.5 + 0.25 * torch.randn(64, 1, 32, 32, generator=rng)  # a standard deviation of 1/2 in [-1, 1]
    for sigma in (0.01, 0.2, 10.0):
        net(clean + sigma * torch.randn(clean.shape, generator=rng), sigma)
        assert abs(seen["x"].std() - 1) < 0.02


# -- The range of the data


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, None),
        ({"sample_shape": (2,)}, None),
        ({"sample_shape": (1, 50)}, None),
        ({"sample_shape": (3, 8, 8)}, (0.0, 1.0)),
        ({"sample_shape": [3, 8, 8]}, (0.0, 1.0)),
        ({"sample_shape": (3, 8, 8), "value_range": None}, None),
        ({"sample_shape": (2,), "value_range": (-1, 2)}, (-1.0, 2.0)),
        ({"sample_shape": (3, 8, 8), "value_range": (0, 255)}, (0.0, 255.0)),
    ],
)
def test_only_images_have_a_value_range_by_default(arguments, expected):
    net = ScoreNet(Backbone(lambda x, c: x), LEVELS, **arguments)
    assert net.value_range == expected
    assert net.config["value_range"] == (None if expected is None else list(expected))


def test_a_value_range_that_is_assigned_is_checked():
    net = ScoreNet(Backbone(lambda x, c: x), LEVELS, sample_shape=(3, 8, 8))
    for wrong in [(5, -5), (1, 2, 3), 5, "auto"]:
        with pytest.raises(ValueError, match=r"value_range must be \(low, high\), finite with low < high"):
            net.value_range = wrong
    net.value_range = (-5, 5)
    assert net.value_range == (-5.0, 5.0) and net.config["value_range"] == [-5.0, 5.0]
    net.value_range = None
    assert net.value_range is None and net.config["value_range"] is None


MOMENTS = {"data_mean": [0.3], "data_spectrum": [0.04] * 4}


@pytest.mark.parametrize(
    "settings",
    [
        SamplerSettings(levels=30, step_size=5e-5, consistent=True),
        SamplerSettings("ode", sigmas=[2, 0.5, 0.1], method="unipc", **MOMENTS),
        SamplerSettings("ode", levels=8, churn=2, churn_min=0.05, churn_max=2),
        SamplerSettings(
            "ancestral", levels=9, alternatives=[SamplerSettings("ode", levels=3, sigma_max=5, sigma_min=0.1)]
        ),
    ],
    ids=str,
)
def test_a_network_with_settings_is_the_same_in_the_units_of_another_range(settings):
    """Its step size, noise levels and moments stayed those of the range before, so that its samples were others."""
    net = ScoreNet(Backbone(_karras), LEVELS, precondition="karras", sample_shape=(1, 4, 1))
    net.sampler_settings = settings

    def samples():
        calls = [None, *(len(recommended_sampler(net, each)) for each in settings.alternatives)]
        return [run(recommended_sampler(net, calls=each), 5, generator=0) for each in calls]

    expected = samples()
    net.value_range = (-3, 1)
    for found, before in zip(samples(), expected, strict=True):
        torch.testing.assert_close(found, 4 * before - 3, rtol=1e-4, atol=1e-4)


def test_samples_of_points_are_not_clamped(rng):
    """The score is the exact one of eight points on a circle of radius 2."""
    angles = torch.arange(8) * math.pi / 4
    ring = 2 * torch.stack([angles.cos(), angles.sin()], dim=1)

    def sigma_times_score(x, sigma):
        sigma = sigma[:, None]
        weights = (-((x[:, None] - ring) ** 2).sum(2) / (2 * sigma**2)).softmax(1)
        return (weights @ ring - x) / sigma

    backbone = Backbone(sigma_times_score, torch.float32)
    net = ScoreNet(backbone, LEVELS, precondition="ncsnv2", sample_shape=(2,))
    x = run(AnnealedLangevinSampler(net, LEVELS, consistent=True), 50, generator=rng)
    assert ((x.norm(dim=1) - 2).abs() < 0.05).all()


# -- sigma in every form


@pytest.mark.parametrize("family", ["ncsn", "ncsnv2"])
def test_every_form_of_sigma_gives_the_same_score(family, rng):
    net = getattr(ScoreNet, family)(1, 8, width=4)
    x = torch.rand(3, 1, 8, 8, generator=rng)
    reference = net(x, 0.3)
    tensors = (torch.tensor(0.3), torch.full((3,), 0.3), torch.tensor(0.3, dtype=torch.float64))
    for sigma in (*tensors, np.float32(0.3), [0.3, 0.3, 0.3]):
        torch.testing.assert_close(net(x, sigma), reference)
    torch.testing.assert_close(net(x, 1), net(x, 1.0))
    mixed = net(x, torch.tensor([0.3, 0.02, 1.0]))
    for i, sigma in [(1, 0.02), (2, 1)]:
        alone = net(x[i : i + 1], sigma)
        assert (mixed[i] - alone).abs().max() <= 2e-5 * alone.abs().max()


@pytest.mark.slow
def test_ncsn_gives_the_published_outputs_and_interpolates_between_levels(published):
    fixture = published("ncsn_mnist")
    net = ScoreNet.ncsn(1, 28, width=8, schedule=NoiseSchedule.geometric(1, 0.01, 10))
    net.backbone.load_state_dict(fixture["weights"])
    case = fixture["cases"][0]
    with torch.no_grad():
        found = net(case["x"], fixture["sigmas"][case["labels"]])
        assert ((found - case["out"]).abs().amax() / case["out"].abs().amax()) <= 2e-5
        x = case["x"][:1]
        torch.testing.assert_close(net(x, 5.0), net(x, 1.0))  # outside of the schedule the nearest level is used
        torch.testing.assert_close(net(x, 1e-4), net(x, 0.01))
        between = net(x, (net.schedule[3] * net.schedule[4]) ** 0.5)
        expected = net.backbone(x, torch.tensor([3.5]))
        assert (between - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_ncsnv2_gives_the_published_outputs(published):
    fixture = published("ncsnv2")
    net = ScoreNet.ncsnv2(3, 32, width=8)
    net.backbone.load_state_dict(fixture["weights"])
    for case in fixture["cases"]:
        with torch.no_grad():
            found = net(case["x"], fixture["sigmas"][case["labels"]])
        assert ((found - case["out"]).abs().amax((1, 2, 3)) <= 2e-5 * case["out"].abs().amax((1, 2, 3))).all()


def test_the_default_networks_have_the_published_levels_and_shapes():
    with on_meta():
        ncsn, ncsnv2 = ScoreNet.ncsn(), ScoreNet.ncsnv2()
    assert ncsn.schedule == NoiseSchedule.geometric(1, 0.01, 10)
    assert ncsnv2.schedule == NoiseSchedule.geometric(50, 0.01, 232)
    assert ncsn.sample_shape == ncsnv2.sample_shape == (3, 32, 32)
    assert ncsn.value_range == (0, 1)
    with torch.device("meta"):
        assert ScoreNet.ncsnv2(2, (24, 40), width=2).sample_shape == (2, 24, 40)


# -- dtypes and conditions


def test_the_result_has_the_dtype_of_x_and_the_backbone_gets_its_own_dtype(rng):
    seen = []

    def function(x, c_noise):
        seen.append((x.dtype, c_noise.dtype, tuple(c_noise.shape)))
        return x

    x = torch.rand(2, 1, 4, 4, generator=rng)
    for inner, noise in [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.half, torch.float32)]:
        net = ScoreNet(Backbone(function, inner), LEVELS)
        for outer in (torch.float32, torch.float64, torch.bfloat16):
            assert net(x.to(outer), 0.1).dtype == outer
            assert net.denoise(x.to(outer), 0.1).dtype == outer
            assert seen[-1] == (inner, noise, (2,))


def test_a_backbone_may_have_complex_weights(rng):
    """As a Fourier neural operator has, whose first parameter is often complex."""

    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.modes = nn.Parameter(torch.full((8, 5), 2, dtype=torch.complex64))
            self.shift = nn.Parameter(torch.ones(()))

        def forward(self, x, c_noise):
            return torch.fft.irfft2(torch.fft.rfft2(x) * self.modes) + self.shift

    x = torch.rand(2, 1, 8, 8, generator=rng)
    twice = ScoreNet(Backbone(lambda x, c_noise: 2 * x + 1, torch.float32), LEVELS)
    torch.testing.assert_close(ScoreNet(Spectral(), LEVELS)(x, 0.5), twice(x, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("copy", [False, True])
def test_denoised_images_in_half_precision_are_accurate_at_high_noise(copy, dtype, rng):
    """The score is rounded to the dtype of x; the product of it and sigma squared would be wrong by up to 0.6."""
    net = ScoreNet.from_pretrained("mnist")
    x = (0.5 + 40 * torch.randn(1, 1, 28, 28, generator=rng)).to(dtype)
    with torch.no_grad():
        found = (net.inference_copy() if copy else net).denoise(x, 40.0)
        expected = net.denoise(x.float(), 40.0)
    assert found.dtype == dtype and (found.float() - expected).abs().max() < 0.01


def test_the_condition_is_passed_to_the_backbone_only_if_given(rng):
    seen = []

    def function(x, c_noise, *condition):
        seen.append(condition)
        return x

    net = ScoreNet(Backbone(function), LEVELS)
    x, label = torch.rand(2, 1, 4, 4, generator=rng), torch.tensor([1, 2])
    net(x, 0.1)
    net(x, 0.1, label)
    net.denoise(x, 0.1, condition=label)
    assert seen[0] == () and seen[1][0] is label and seen[2][0] is label


# -- Bad input


def _with_copy(net):
    return {"network": net, "inference copy": net.inference_copy()}


@functools.cache
def _of_levels():
    return _with_copy(ScoreNet.ncsn(1, 8, width=2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, x: net((255 * x).long(), 0.1), TypeError, r"floating point.*int64. Write x / 255"),
        (lambda net, x: net(x.numpy(), 0.1), TypeError, r"must be a tensor .*got ndarray. Write torch.as_tensor\(x\)"),
        (lambda net, x: net([x, 1], 0.1), TypeError, r"got list. A batch of a data set with labels is \[x, y\]"),
        (lambda net, x: net((x, 1), 0.1), TypeError, "got tuple. A batch of a data set .*pass its first entry"),
        (lambda net, x: net(x[:0], 0.1), ValueError, r"at least one sample, got shape \(0, 1, 8, 8\)"),
        (lambda net, x: net(x[0, 0, 0], 0.1), ValueError, r"must be a batch \(N, ...\) .*got shape \(8,\)"),
        (lambda net, x: net(x, torch.ones(3)), ValueError, r"\(2,\) like the batch, got shape \(3,\)"),
        (lambda net, x: net(x, torch.ones(2, 1)), ValueError, r"got shape \(2, 1\)"),
        (lambda net, x: net(x, 0.0), ValueError, "sigma must be positive, got 0"),
        (lambda net, x: net(x, -1), ValueError, "sigma must be positive, got -1"),
        (lambda net, x: net(x, None), TypeError, r"sigma must be a noise level, a float or a tensor .*, got None"),
        (lambda net, x: net(x, "0.1"), TypeError, r"sigma must be a noise level, .*, got '0.1'"),
        (lambda net, x: net(x, math.nan), ValueError, "sigma must be positive, got nan"),
        (lambda net, x: net(x, torch.tensor(0.0)), ValueError, "sigma must be positive, got 0"),
        (lambda net, x: net(x, torch.tensor([0.5, -0.25])), ValueError, "sigma must be positive, got -0.25"),
        (lambda net, x: net.denoise(x, 0.0), ValueError, "sigma must be positive, got 0"),
        (
            lambda net, x: net(x, torch.tensor(7)),
            TypeError,
            r"a standard deviation in the units of x, got torch.int64. Write schedule\[i\] for level i of a schedule",
        ),
        (lambda net, x: net(x, torch.tensor([7, 3])), TypeError, "a floating-point noise level.*got torch.int64"),
        (lambda net, x: net(x, np.int64(7)), TypeError, "a floating-point noise level.*got torch.int64"),
        (lambda net, x: net(x, 0.1, torch.tensor([1, 2])), TypeError, "takes no condition"),
        (lambda net, x: net(x[:, :, :7], 0.1), ValueError, "multiples of 2"),
    ],
)
@pytest.mark.parametrize("kind", ["network", "inference copy"])
def test_invalid_arguments_of_a_network_raise(kind, call, error, message, rng):
    with pytest.raises(error, match=message):
        call(_of_levels()[kind], torch.rand(2, 1, 8, 8, generator=rng))


@pytest.mark.slow
def test_values_that_cannot_be_read_are_not_checked(rng):
    """Values inside torch.func.vmap, and values on another device than the CPU."""
    net, x = ScoreNet.ncsnv2(1, 8, width=2), torch.rand(3, 1, 8, 8, generator=rng)
    sigma = torch.tensor([0.3, 0.1, 1.0])
    found = torch.func.vmap(lambda x, sigma: net(x[None], sigma)[0])(x, sigma)
    torch.testing.assert_close(found, net(x, sigma), rtol=1e-4, atol=1e-4)
    score = net.to("meta")(torch.empty(2, 1, 8, 8, device="meta"), torch.zeros(2, device="meta"))
    assert score.is_meta


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ScoreNet(nn.Identity, LEVELS),
            TypeError,
            r"got <class .*Identity'>. Pass an instance, YourModule\(\)",
        ),
        (lambda: ScoreNet(lambda x, c: x, LEVELS), TypeError, "got <function .*Wrap it in a torch.nn.Module"),
        (lambda: ScoreNet(nn.Identity(), [1.0, 0.1]), TypeError, r"got list. Write NoiseSchedule\(sigmas\)"),
        (lambda: ScoreNet(nn.Identity(), LEVELS, precondition="edm"), ValueError, "one of 'ncsn', .*got 'edm'"),
        (lambda: ScoreNet(nn.Identity(), LEVELS, value_range=(1, 0)), ValueError, "low < high"),
        (lambda: ScoreNet(nn.Identity(), LEVELS, value_range="images"), ValueError, "low < high.*got 'images'"),
        (lambda: ScoreNet(nn.Identity(), LEVELS, value_range=1), ValueError, "low < high.*got 1"),
        (lambda: ScoreNet(nn.Identity(), LEVELS, sample_shape=28), TypeError, "must be a tuple such as .* got 28"),
        (lambda: ScoreNet(nn.Identity(), LEVELS, value_range=(-math.inf, math.inf)), ValueError, "finite .*got"),
        (
            lambda: ScoreNet(nn.Identity(), LEVELS, sample_shape="abc"),
            TypeError,
            "must be a tuple such as .* got 'abc'",
        ),
        (lambda: ScoreNet(nn.Identity(), LEVELS, sample_shape=(3, 0, 8)), ValueError, "positive integers, got"),
        (lambda: ScoreNet.ncsnpp(1, (3, 8, 8), widths=(4,)), ValueError, r"a side, \(height, width\), got \(3, 8, 8\)"),
        (
            lambda: ScoreNet.unet(1, (3, 8, 8, 8), widths=(4,)),
            ValueError,
            r"must be a side, \(height, width\), \(length,\) or \(depth, height, width\), got \(3, 8, 8, 8\)",
        ),
        (lambda: ScoreNet.unet(1, "8", widths=(4,)), TypeError, r"image_size must be a side or .*, got '8'"),
        (
            lambda: ScoreNet.unet(3, 3, widths=(4, 4, 4)),
            ValueError,
            "^every side of a sample must be at least 4, the largest stride, got 3x3.$",
        ),
        (
            lambda: ScoreNet.ncsnv2(3, (8, 13), width=2, depth="deeper"),
            ValueError,
            r"multiples of 4, got 8x13. Pass image_size=\(8, 12\) or image_size=\(8, 16\).$",
        ),
        (lambda: ScoreNet.ncsnv2(1, 28, width=2, depth="deepest"), ValueError, "multiples of 8, got 28x28"),
        (lambda: ScoreNet.ncsn(1, 0, width=2), ValueError, "image_size must be a side or .*, positive integers, got"),
        (lambda: ScoreNet.unet(1, 8, widths=64), TypeError, r"widths must be a tuple such as \(64, .* got 64"),
        (
            lambda: ScoreNet.unet(1, 8, widths=(4,), classes=0),
            ValueError,
            "ScoreNet.unet: classes must be an integer .* or None, got 0",
        ),
        (lambda: ScoreNet.unet(0, 8, widths=(4,)), ValueError, "channels must be an integer of at least 1 .* got 0"),
        (lambda: ScoreNet.unet(1, 8, widths=(4,), patch=0), ValueError, "patch must be an integer of at least 1"),
        (lambda: ScoreNet.unet(3, 8, widths=(4,), condition_channels=-1), ValueError, "must be at least 0, got -1"),
        (lambda: ScoreNet.ncsnpp(1, 8, layers_per_block=0), ValueError, "ScoreNet.ncsnpp: layers_per_block must be an"),
        (
            lambda: ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=(2, 0)),
            ValueError,
            r"ScoreNet.unet: layers_per_block must be an integer .* or a list of such values, got \[2, 0\]",
        ),
        (
            lambda: ScoreNet.unet(1, 8, widths=(4, 4), layers_per_block=(2, 1, 1)),
            ValueError,
            "layers_per_block must be an integer or have one entry per scale, 2, got 3",
        ),
        (lambda: ScoreNet.ncsnv2(1, 8, width=2.0), ValueError, "ScoreNet.ncsnv2: width must be an integer"),
        (
            lambda: ScoreNet.ncsnv2(1, 8, width=2, precondition="ncsn"),
            ValueError,
            "precondition must be one of 'ncsnv2', 'karras', got 'ncsn'",
        ),
        (
            lambda: ScoreNet(RefineNet(1, 2, levels=10), LEVELS, precondition="ncsn"),
            ValueError,
            "parameters for 10 noise levels, but the schedule has 30",
        ),
        (lambda: ScoreNet(RefineNet(1, 2), LEVELS, precondition="ncsn"), ValueError, "does not fit this RefineNet"),
        (lambda: ScoreNet(RefineNet(1, 2, levels=30), LEVELS), ValueError, "does not fit this RefineNet"),
        (
            lambda: ScoreNet.unet(1, 8, widths=(4, 4), attention=[True]),
            ValueError,
            "attention must have one entry per scale, 2, got 1",
        ),
    ],
)
def test_invalid_arguments_of_score_net_raise(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- The shape of the output


def _narrow(x, c_noise, *condition):
    return x[:, :1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_narrow, r"returned shape \(2, 1, 8, 8\) for x of shape \(2, 3, 8, 8\)"),
        (lambda x, c: x[..., :1], r"returned shape \(2, 3, 8, 1\) for x of shape \(2, 3, 8, 8\)"),
        (lambda x, c: x.mean(), r"returned shape \(\) for x of shape \(2, 3, 8, 8\)"),
        (lambda x, c: torch.cat([x, x]), r"returned shape \(4, 3, 8, 8\) for x of shape \(2, 3, 8, 8\)"),
        (
            lambda x, c: torch.cat([x, x], dim=1),
            r"returned shape \(2, 6, 8, 8\) for x of shape \(2, 3, 8, 8\). Pass predicts_variance=True",
        ),
    ],
)
def test_an_output_of_another_shape_raises(function, message, rng):
    net = ScoreNet(Backbone(function, torch.float32), LEVELS, sample_shape=(3, 8, 8))
    with pytest.raises(ValueError, match=message):
        net(torch.rand(2, 3, 8, 8, generator=rng), 0.1)
    with pytest.raises(ValueError, match=message):
        run(AnnealedLangevinSampler(net, NoiseSchedule([1.0, 0.1])), 2)


def test_an_output_that_is_not_a_tensor_raises(rng):
    net = ScoreNet(Backbone(lambda x, c: (x,)), LEVELS)
    with pytest.raises(TypeError, match=r"tensor of the shape of x, got tuple.*ScoreNet.from_diffusers\(unet, sched"):
        net(torch.rand(2, 3, 8, 8, generator=rng), 0.1)


@pytest.mark.parametrize("shape", [(4, 20, 12, 3), (4, 1, 20, 12), (4, 20, 12)])
def test_images_of_another_shape_than_a_wrapped_network_takes_raise(shape, rng):
    net = ScoreNet(nn.Conv2d(3, 3, 1), LEVELS, sample_shape=(3, 20, 12))
    with pytest.raises(ValueError, match=r"x must be images \(N, 3, H, W\), got shape \(4, "):
        net(torch.rand(shape, generator=rng), 0.1)


def test_the_predicted_variance_is_not_part_of_the_score(rng):
    x = torch.rand(2, 3, 8, 8, generator=rng)
    both = Backbone(lambda x, c: torch.cat([x.sin(), x.exp()], dim=1))
    plain = ScoreNet(Backbone(lambda x, c: x.sin()), LEVELS, precondition="ncsnv2")
    net = ScoreNet(both, LEVELS, precondition="ncsnv2", predicts_variance=True)
    assert torch.equal(net(x, 0.1), plain(x, 0.1))
    score, share = net.score_and_variance(x, 0.1)
    assert torch.equal(score, net(x, 0.1)) and torch.equal(share, (1 + x.double().exp().float()) / 2)
    with pytest.raises(ValueError, match=r"predicts no variance. Call net\(x, sigma\) for the score alone"):
        plain.score_and_variance(x, 0.1)
    assert net.config["predicts_variance"] and not plain.config["predicts_variance"]
    wrong = ScoreNet(Backbone(lambda x, c: x), LEVELS, predicts_variance=True)
    with pytest.raises(
        ValueError, match=r"\(2, 3, 8, 8\) for x of .*predicts_variance=True it must return twice the ch"
    ):
        wrong(x, 0.1)


# -- Loading


@pytest.mark.parametrize("name", [card.name for card in cards.CARDS if card.repository is None])
def test_loading_leaves_the_global_generator_alone(name):
    before = torch.get_rng_state()
    ScoreNet.from_pretrained(name)
    assert torch.equal(torch.get_rng_state(), before)


# -- What the network takes as its condition


def _unet(channels, outputs, **options):
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet(channels, outputs, block_out_channels=(4,), norm_num_groups=2, add_attention=False, **kinds, **options)


@pytest.mark.parametrize("sample_shape", [None, (3, 8, 8)])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: (RefineNet(3, 2), {"precondition": "ncsnv2"}), Condition()),
        (lambda: (RefineNet(3, 2, levels=30), {"precondition": "ncsn"}), Condition()),
        (lambda: (_unet(3, 3), {}), Condition()),
        (lambda: (_unet(4, 3), {}), Condition(channels=1)),
        (lambda: (_unet(3, 3, num_class_embeds=10), {}), Condition(classes=10)),
        (lambda: (_unet(3, 6), {"predicts_variance": True}), Condition()),
        (lambda: (_unet(5, 6), {"predicts_variance": True}), Condition(channels=2)),
        (lambda: (nn.Identity(), {}), None),
    ],
)
def test_conditioning_does_not_need_a_sample_shape(make, expected, sample_shape):
    backbone, arguments = make()
    net = ScoreNet(backbone, LEVELS, sample_shape=sample_shape, **arguments)
    assert net.conditioning == expected
    if expected is not None:
        assert net.inference_copy().conditioning == expected


def test_print_shows_the_noise_levels(capsys):
    print(ScoreNet.ncsn(1, 28, width=2))
    shown = "NoiseSchedule(10 levels, 1 -> 0.01), precondition='ncsn', sample_shape=(1, 28, 28)"
    assert shown in capsys.readouterr().out


def test_a_network_that_is_loaded_in_inference_mode_can_be_trained(tmp_path):
    ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, schedule=LEVELS).save_pretrained(tmp_path)
    with torch.inference_mode():
        net = ScoreNet.from_pretrained(tmp_path)
    dsm_loss(net, torch.rand(2, 1, 8, 8)).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


# -- Classes as a condition


@functools.cache
def _of_classes():
    torch.manual_seed(0)
    net = ScoreNet.unet(1, 8, widths=(4,), layers_per_block=1, classes=10, schedule=LEVELS)
    for parameter in net.parameters():  # the zeros of the beginning would hide what the network sees
        nn.init.normal_(parameter, std=0.3)
    return _with_copy(net)


@pytest.mark.parametrize("kind", ["network", "inference copy"])
@torch.no_grad()
def test_an_int_is_the_class_of_all_samples(kind, rng):
    net, x = _of_classes()[kind], torch.rand(3, 1, 8, 8, generator=rng)
    assert torch.equal(net(x, 0.2, 7), net(x, 0.2, torch.tensor([7, 7, 7])))
    assert torch.equal(net.denoise(x, 0.2, condition=7), net.denoise(x, 0.2, condition=torch.tensor([7, 7, 7])))
    assert torch.equal(net(x, 0.2, torch.tensor([1, 2, 3]).int()), net(x, 0.2, torch.tensor([1, 2, 3])))
    assert not torch.equal(net(x, 0.2, 7), net(x, 0.2, 6))
    seen = []
    own = ScoreNet(Backbone(lambda x, c, condition: (seen.append(condition), x)[1]), LEVELS)
    own(x, 0.2, 7)
    assert seen[0].dtype == torch.int64 and seen[0].tolist() == [7, 7, 7]


def test_classes_inside_vmap_are_not_checked(rng):
    net = ScoreNet(_unet(1, 1, num_class_embeds=10), LEVELS, sample_shape=(1, 8, 8))
    x, classes = torch.rand(3, 1, 8, 8, generator=rng), torch.tensor([1, 5, 9])
    found = torch.func.vmap(lambda x, label: net(x[None], 0.2, label[None])[0])(x, classes)
    torch.testing.assert_close(found, net(x, 0.2, classes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (None, ValueError, r"takes classes as its condition, int64 \(N,\) from 0 to 9: pass condition="),
        (10, ValueError, "from 0 to 9, got class 10"),
        (-1, ValueError, "from 0 to 9, got class -1"),
        (torch.tensor([0, 10]), ValueError, "from 0 to 9, got class 10"),
        (torch.tensor([-1, 9]), ValueError, "from 0 to 9, got class -1"),
        (torch.tensor([1.0, 2.0]), TypeError, r"got torch.float32 of shape \(2,\). Write condition.long\(\)"),
        (torch.tensor([True, False]), TypeError, r"got torch.bool of shape \(2,\). Write condition.long\(\)"),
        (torch.zeros(2, 1, 8, 8), TypeError, r"takes classes .*, got torch.float32 of shape \(2, 1, 8, 8\).$"),
        (torch.tensor([1, 2, 3]), ValueError, r"one entry for each of 2 samples, got shape \(3,\)"),
        (torch.tensor(10), ValueError, "from 0 to 9, got class 10"),
        (torch.tensor(1.0), TypeError, r"got torch.float32 of shape \(\)"),
        (torch.tensor([[1], [2]]), ValueError, r"classes must have shape \(2,\) like the batch, got \(2, 1\)"),
        ("a", TypeError, r"or an int for one class, got str. Write net.class_names.index\('a'\)"),
        (True, TypeError, "or an int for one class, got bool"),
        ([1, 2], TypeError, "or an int for one class, got list"),
    ],
)
@pytest.mark.parametrize("kind", ["network", "inference copy"])
def test_invalid_classes_raise(kind, condition, error, message, rng):
    with pytest.raises(error, match=message):
        _of_classes()[kind](torch.rand(2, 1, 8, 8, generator=rng), 0.1, condition)


# -- An image as a condition


def _conditional():
    torch.manual_seed(0)
    net = ScoreNet.unet(3, 8, widths=(4, 8), layers_per_block=1, condition_channels=1, schedule=LEVELS)
    for parameter in net.parameters():  # the zeros of the beginning would hide what the network sees
        nn.init.normal_(parameter, std=0.3)
    return net


def test_an_image_condition_is_scaled_as_the_preconditioning_row_says(rng):
    """In [-1, 1] beside a centered image, without noise and its scale; as it is beside one that is not."""
    seen = []

    def function(x, c_noise, condition):
        seen.append(condition)
        return x

    x, image = torch.rand(2, 1, 4, 4, generator=rng), torch.rand(2, 2, 4, 4, generator=rng)
    ScoreNet(Backbone(function), LEVELS, sample_shape=(1, 4, 4))(x, 0.1, image)
    ScoreNet(Backbone(function), LEVELS, value_range=(0, 2))(x, 3.0, image)
    ScoreNet(Backbone(function), LEVELS)(x, 0.1, image)
    ScoreNet(Backbone(function), LEVELS, precondition="ncsnv2", value_range=(0, 1))(x, 0.1, image)
    for found, expected in zip(seen, [2 * image - 1, image - 1, image, image], strict=True):
        torch.testing.assert_close(found, expected, check_dtype=False)
    ScoreNet(Backbone(function, torch.float32), LEVELS)(x.double(), 0.1, image.double())
    assert seen[-1].dtype == torch.float32


def test_images_of_a_batch_use_their_own_condition(rng):
    net = _conditional()
    x, image = torch.rand(2, 3, 8, 8, generator=rng), torch.rand(2, 1, 8, 8, generator=rng)
    other = torch.stack([image[0], 1 - image[1]])
    a, b = net(x, 0.2, image), net(x, 0.2, other)
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("net", "condition", "error", "message"),
    [
        (_conditional, None, ValueError, r"an image as its condition, float \(N, 1, H, W\): pass condition="),
        (_conditional, 7, TypeError, r"an image as its condition, float \(N, 1, H, W\), got 7"),
        (_conditional, torch.tensor([1, 2]), TypeError, r"float \(N, 1, H, W\), got torch.int64 of shape \(2,\)"),
        (
            _conditional,
            torch.zeros(2, 3, 8, 8),
            ValueError,
            r"must have 4 channels in all, got x of shape \(2, 3, 8, 8\) and a condition of shape \(2, 3, 8, 8\)",
        ),
        (_conditional, torch.zeros(2), ValueError, r"must have 4 channels in all, .*a condition of shape \(2,\)"),
        (
            _conditional,
            torch.zeros(1, 1, 8, 8),
            ValueError,
            r"one entry for each of 2 samples, got shape \(1, 1, 8, 8\)",
        ),
        (_conditional, torch.zeros(2, 1, 4, 8), ValueError, r"x's batch and size, .*got \(2, 1, 4, 8\)"),
        (
            lambda: ScoreNet.unet(3, 8, widths=(4, 8)),
            torch.zeros(2, 1, 8, 8),
            TypeError,
            r"takes no condition\. Leave it out, or build .* classes=, condition_channels= or condition_features=",
        ),
        (lambda: ScoreNet.unet(3, 8, widths=(4, 8)), 7, TypeError, "takes no condition"),
        (lambda: ScoreNet.unet(3, 8, widths=(4, 8)), "a", TypeError, "condition must be a tensor, .*got str"),
        (lambda: ScoreNet.ncsnv2(3, 8, width=2), torch.zeros(2, 1, 8, 8), TypeError, "takes no condition"),
        (lambda: ScoreNet(Backbone(_narrow), LEVELS), "a", TypeError, "condition must be a tensor, .*got str"),
    ],
)
def test_invalid_conditions_raise(net, condition, error, message, rng):
    with pytest.raises(error, match=message):
        net()(torch.rand(2, 3, 8, 8, generator=rng), 0.1, condition)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 8, 8, 3)])
def test_a_wrong_number_of_channels_gives_an_error_about_channels(shape, rng):
    """Without a word about conditions that the network does not take."""
    for net in (ScoreNet.unet(3, 8, widths=(4, 8)), ScoreNet.ncsn(3, 8, width=2)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)|3 channels in all") as caught:
            net(torch.rand(shape, generator=rng), 0.1)
        assert str(shape) in str(caught.value)
