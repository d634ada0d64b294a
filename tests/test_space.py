"""Networks of signals, images and volumes: sizes, padding, periodic data, and every use of a network."""

import pytest
import torch
import torch.nn.functional as F

from scorematch import AnnealedLangevinSampler, ScoreNet, dsm_loss
from scorematch.likelihood import log_likelihood
from scorematch.nets.space import PADDINGS, Space, from_patches, to_patches
from scorematch.restoration import Linear, Observation
from scorematch.sampling import ODESampler
from tests.helpers import seed

SIZES = {1: (13,), 2: (9, 14), 3: (6, 9, 5)}
each_dimension = pytest.mark.parametrize("size", SIZES.values(), ids=["1-D", "2-D", "3-D"])
MODES = {"zeros": "constant", "circular": "circular", "reflect": "reflect"}


def random(*shape, number=0):
    return torch.randn(*shape, generator=seed(number))


def network(size, channels=2, **options):
    torch.manual_seed(0)
    net = ScoreNet.unet(channels, size, widths=(8, 16), layers_per_block=1, **options)
    net.value_range = None
    for parameter in net.parameters():  # the last convolution is zero at first
        parameter.data += 0.1 * torch.randn_like(parameter)
    return net.eval()


# -- Convolutions and patches


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
def test_a_convolution_with_padding(padding, dimensions, stride):
    conv = Space.of(dimensions, padding).conv(2, 3, stride=stride)
    x = random(2, 2, *(6, 8, 4)[:dimensions])
    padded = F.pad(x, (1, 1) * dimensions, mode=MODES[padding])
    function = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    assert torch.allclose(conv(x), function(padded, conv.weight, conv.bias, stride=stride), atol=1e-6)


def test_each_axis_has_its_own_padding():
    conv = Space.of(2, ["circular", "zeros"]).conv(1, 1)
    x = random(1, 1, 6, 8)
    padded = F.pad(F.pad(x, (0, 0, 1, 1), mode="circular"), (1, 1, 0, 0))
    assert torch.allclose(conv(x), F.conv2d(padded, conv.weight, conv.bias), atol=1e-6)


@pytest.mark.parametrize("size", [(8,), (8, 4), (8, 4, 12)])
def test_patches(size):
    x = random(2, 3, *size)
    y = to_patches(x, 4)
    assert y.shape == (2, 3 * 4 ** len(size), *(side // 4 for side in size))
    first = x[(0, 1, *[slice(0, 4)] * len(size))]  # the first patch of the second channel
    assert torch.equal(y[(0, slice(4 ** len(size), 2 * 4 ** len(size)), *[0] * len(size))], first.flatten())
    assert torch.equal(from_patches(y, 4), x)
    if len(size) == 2:  # the code for other dimensions agrees with that of torch
        volume = to_patches(x[:, :, None].expand(-1, -1, 4, -1, -1), 4)
        assert torch.equal(volume.unflatten(1, (3, 4, 16))[:, :, 2].flatten(1, 2)[:, :, 0], y)


# -- Networks

PATCHES = {"patch": 2, "pixel_channels": 8}


@each_dimension
@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in (PATCHES, {"padding": "circular"}))],
    ids=str,
)
def test_a_network_of_any_size(size, options, tmp_path):
    net, x = network(size, **options), random(3, 2, *size)
    y = net(x, 0.3).detach()
    assert y.shape == x.shape and torch.allclose(net(x[1:2], 0.3), y[1:2], atol=1e-5)
    assert torch.allclose(net.inference_copy()(x, 0.3), y, rtol=0.05, atol=0.05 * float(y.std()))
    net.save_pretrained(tmp_path)
    assert torch.equal(ScoreNet.from_pretrained(tmp_path)(x, 0.3), y)
    dsm_loss(net, x, generator=seed()).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("size", [(13,), (12, 11)])
def test_padding_inside_is_repetition_of_the_last_value(size):
    net, x = network(size), random(2, 2, *size)
    larger = x
    for axis, side in enumerate(size):
        if side % 2:
            last = larger.narrow(axis + 2, side - 1, 1)
            larger = torch.cat([larger, last], axis + 2)
    whole = net(larger, 0.3)
    assert torch.equal(net(x, 0.3), whole[(..., *map(slice, size))])


@pytest.mark.parametrize("options", [{}, {"patch": 2}], ids=["pixels", "patches"])
@pytest.mark.parametrize("size", [(16,), (16, 8), (8, 8, 16)])
def test_a_periodic_network_commutes_with_shifts_by_its_stride(size, options):
    net, x = network(size, padding="circular", **options), random(2, 2, *size)
    shifts, axes = [4] * len(size), list(range(2, 2 + len(size)))
    shifted = net(x.roll(shifts, axes), 0.3)
    assert torch.allclose(shifted, net(x, 0.3).roll(shifts, axes), atol=1e-4)
    zeros = network(size, padding="zeros", **options)
    assert not torch.allclose(zeros(x.roll(shifts, axes), 0.3), zeros(x, 0.3).roll(shifts, axes), atol=1e-2)


def test_a_network_is_periodic_along_the_axes_that_are(tmp_path):
    """The reflection of an axis whose values end in one is that value."""
    network((8, 4, 2), padding=["circular", "zeros", "reflect"]).save_pretrained(tmp_path)
    net, x = ScoreNet.from_pretrained(tmp_path), random(1, 2, 8, 4, 2)
    same = [torch.allclose(net(x.roll(2, i), 0.3), net(x, 0.3).roll(2, i), atol=1e-4) for i in (2, 3)]
    assert same == [True, False]


def test_networks_of_one_two_and_three_dimensions_agree_on_data_that_vary_along_one_axis():
    """With the same weights along this axis, divided by the number of taps along the periodic others."""
    line = network((8,), padding="circular", attention=(False, False))
    x = random(2, 2, 8)
    expected = line(x, 0.3)
    for axes in (2, 3):
        net = network((8,) * axes, padding="circular", attention=(False, False))
        weights = line.state_dict()
        for name, weight in net.state_dict().items():
            own = weights[name]
            if own.ndim == 3:  # of a convolution
                others = weight.shape[2:-1]
                own = own.view(*own.shape[:2], *[1] * len(others), -1).expand_as(weight) / others.numel()
            weight.copy_(own)
        y = net(x.view(2, 2, *[1] * (axes - 1), 8).expand(-1, -1, *[8] * (axes - 1), -1), 0.3)
        assert torch.allclose(y, expected.view(2, 2, *[1] * (axes - 1), 8).expand_as(y), atol=1e-4)


def test_only_images_have_a_value_range_by_default():
    assert [ScoreNet.unet(1, size, widths=(4,)).value_range for size in SIZES.values()] == [None, (0, 1), None]


@pytest.mark.slow
@each_dimension
def test_samplers_likelihood_and_restoration(size):
    net = network(size)
    x = AnnealedLangevinSampler(net, levels=3).sample(2, generator=0, progress=False)
    assert x.shape == (2, 2, *size)
    first = Observation(Linear(lambda x: x[..., :2]), x[..., :2], 0.1)
    restored = ODESampler(net, levels=3, restore="guide-jacobian").sample(
        2, observation=first, generator=0, progress=False
    )
    assert restored.shape == x.shape
    log_density = log_likelihood(net, x, net.schedule.respaced(3), generator=0, progress=False)
    assert log_density.shape == (2,) and log_density.isfinite().all()


def test_a_condition_of_the_size_of_the_data():
    net = network((13,), condition_channels=1)
    x, condition = random(2, 2, 13), random(2, 1, 13)
    assert net.conditioning.channels == 1
    assert not torch.equal(net(x, 0.3, condition), net(x, 0.3, -condition))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network((8, 8), padding="mirror"), "padding must be one of 'zeros', 'circular', 'reflect', or"),
        (lambda: network((8, 8), padding=["zeros"]), r"padding must be one name, or one for each of 2 axes, got"),
        (lambda: network((8,))(random(1, 2, 8, 8), 0.3), r"x must be signals \(N, 2, L\), got shape"),
        (lambda: network((8, 8, 8))(random(1, 2, 8), 0.3), r"x must be volumes \(N, 2, D, H, W\), got shape"),
        (lambda: network((1,)), "every side of a sample must be at least 2, the largest stride, got 1"),
        (lambda: ScoreNet.ncsnpp(1, (8,), widths=(8,)), r"image_size must be a side, \(height, width\), got \(8,\)"),
    ],
)
def test_invalid_arguments_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
