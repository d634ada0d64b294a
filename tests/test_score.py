import pytest
import torch
from torch import nn

from scorematch import NoiseSchedule, ScoreNet
from scorematch.nets import RefineNet

LADDER = NoiseSchedule.geometric(10, 0.01, 30)


class Backbone(nn.Module):
    """A function as a backbone, with one parameter that says in which dtype it computes."""

    def __init__(self, function, dtype=torch.float64):
        super().__init__()
        self.function = function
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self, x, c_noise, *condition):
        return self.function(x, c_noise, *condition)


def _wide(t):
    return t.view(-1, 1, 1, 1)


# -- The preconditioning table: the backbone that is exact on Gaussian data gives the exact score in [0, 1] units.

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
    net = ScoreNet(Backbone(function), LADDER, precondition=row)
    x = torch.rand(4, 1, 3, 5, generator=rng, dtype=torch.float64)
    sigma = torch.tensor([10.0, 1.0, 0.07, 0.01], dtype=torch.float64)
    torch.testing.assert_close(net(x, sigma), _exact(x, _wide(sigma)), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(net(x, 0.3), _exact(x, 0.3), rtol=1e-9, atol=1e-9)
    posterior = (DEVIATION**2 * x + 0.09 * MEAN) / (DEVIATION**2 + 0.09)
    torch.testing.assert_close(net.denoise(x, 0.3), posterior, rtol=1e-9, atol=1e-9)


def test_karras_without_a_range_leaves_the_units_alone(rng):
    """A backbone of zeros is the exact score of N(0, 1/4) where the data have no range, of N(1/2, 1/16) for images."""
    x = torch.randn(5, 2, generator=rng)
    points = ScoreNet(Backbone(lambda x, c: 0 * x), LADDER, value_range=None)
    torch.testing.assert_close(points(x, 0.3), -x / (0.25 + 0.09))
    images = ScoreNet(Backbone(lambda x, c: 0 * x), LADDER)
    torch.testing.assert_close(images(x, 0.3), -(x - 0.5) / (1 / 16 + 0.09))


def test_karras_input_and_target_have_unit_variance(rng):
    seen = {}

    def function(x, c_noise):
        seen["x"] = x
        return torch.zeros_like(x)

    net = ScoreNet(Backbone(function, torch.float32), LADDER)
    clean = 0.5 + 0.25 * torch.randn(64, 1, 32, 32, generator=rng)  # deviation 1/2 in [-1, 1]
    for sigma in (0.01, 0.2, 10.0):
        net(clean + sigma * torch.randn(clean.shape, generator=rng), sigma)
        assert abs(seen["x"].std() - 1) < 0.02


# -- sigma in every form


@pytest.mark.parametrize("family", ["ncsn", "ncsnv2"])
def test_every_form_of_sigma_is_the_same(family, rng):
    net = getattr(ScoreNet, family)(1, 8, width=4)
    x = torch.rand(3, 1, 8, 8, generator=rng)
    reference = net(x, 0.3)
    for sigma in (torch.tensor(0.3), torch.full((3,), 0.3), torch.tensor(0.3, dtype=torch.float64)):
        torch.testing.assert_close(net(x, sigma), reference)
    mixed = net(x, torch.tensor([0.3, 0.02, 1.0]))
    for i, sigma in [(1, 0.02), (2, 1)]:
        alone = net(x[i : i + 1], sigma)
        assert (mixed[i] - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_ncsn_is_the_published_network_at_its_levels_and_between(published):
    fixture = published("ncsn_mnist")
    net = ScoreNet.ncsn(1, 28, width=8, schedule=NoiseSchedule.geometric(1, 0.01, 10))
    net.backbone.load_state_dict(fixture["weights"])
    case = fixture["cases"][0]
    with torch.no_grad():
        found = net(case["x"], fixture["sigmas"][case["labels"]])
        assert ((found - case["out"]).abs().amax() / case["out"].abs().amax()) <= 2e-5
        x = case["x"][:1]
        torch.testing.assert_close(net(x, 5.0), net(x, 1.0))  # beyond the ladder: its end
        torch.testing.assert_close(net(x, 1e-4), net(x, 0.01))
        between = net(x, (net.schedule[3] * net.schedule[4]) ** 0.5)
        expected = net.backbone(x, torch.tensor([3.5]))
        assert (between - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_ncsnv2_is_the_published_network(published):
    fixture = published("ncsnv2")
    net = ScoreNet.ncsnv2(3, 32, width=8)
    net.backbone.load_state_dict(fixture["weights"])
    for case in fixture["cases"]:
        with torch.no_grad():
            found = net(case["x"], fixture["sigmas"][case["labels"]])
        assert ((found - case["out"]).abs().amax((1, 2, 3)) <= 2e-5 * case["out"].abs().amax((1, 2, 3))).all()


def test_published_defaults():
    with torch.device("meta"):
        ncsn, ncsnv2 = ScoreNet.ncsn(), ScoreNet.ncsnv2()
    assert ncsn.schedule == NoiseSchedule.geometric(1, 0.01, 10)
    assert ncsnv2.schedule == NoiseSchedule.geometric(50, 0.01, 232)
    assert ncsn.sample_shape == ncsnv2.sample_shape == (3, 32, 32)
    assert ncsn.value_range == (0, 1)
    with torch.device("meta"):
        assert ScoreNet.ncsnv2(2, (24, 40), width=2).sample_shape == (2, 24, 40)


# -- dtypes and conditions


def test_result_follows_x_and_the_network_computes_in_its_own_dtype(rng):
    seen = []

    def function(x, c_noise):
        seen.append((x.dtype, c_noise.dtype, tuple(c_noise.shape)))
        return x

    x = torch.rand(2, 1, 4, 4, generator=rng)
    for inner, noise in [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.half, torch.float32)]:
        net = ScoreNet(Backbone(function, inner), LADDER)
        for outer in (torch.float32, torch.float64, torch.bfloat16):
            assert net(x.to(outer), 0.1).dtype == outer
            assert net.denoise(x.to(outer), 0.1).dtype == outer
            assert seen[-1] == (inner, noise, (2,))


def test_a_condition_is_passed_on_only_when_given(rng):
    seen = []

    def function(x, c_noise, *condition):
        seen.append(condition)
        return x

    net = ScoreNet(Backbone(function), LADDER)
    x, label = torch.rand(2, 1, 4, 4, generator=rng), torch.tensor([1, 2])
    net(x, 0.1)
    net(x, 0.1, label)
    net.denoise(x, 0.1, condition=label)
    assert seen[0] == () and seen[1][0] is label and seen[2][0] is label


# -- Bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda net, x: net((255 * x).long(), 0.1), TypeError, r"floating point.*int64. Write x / 255"),
        (lambda net, x: net(x, torch.ones(3)), ValueError, r"\(2,\) like the batch, got shape \(3,\)"),
        (lambda net, x: net(x, torch.ones(2, 1)), ValueError, r"got shape \(2, 1\)"),
        (lambda net, x: net(x, 0.1, torch.tensor([1, 2])), TypeError, "takes no condition"),
        (lambda net, x: net(x[:, :, :7], 0.1), ValueError, "multiples of 2"),
    ],
)
def test_bad_input_of_the_score(call, error, message, rng):
    with pytest.raises(error, match=message):
        call(ScoreNet.ncsn(1, 8, width=2), torch.rand(2, 1, 8, 8, generator=rng))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ScoreNet(nn.Identity(), [1.0, 0.1]), TypeError, r"got list. Write NoiseSchedule\(sigmas\)"),
        (lambda: ScoreNet(nn.Identity(), LADDER, precondition="edm"), ValueError, "one of 'ncsn', .*got 'edm'"),
        (lambda: ScoreNet(nn.Identity(), LADDER, value_range=(1, 0)), ValueError, "low < high"),
        (lambda: ScoreNet.ncsnv2(1, 8, width=2, precondition="ncsn"), ValueError, '"ncsnv2" or "karras", got'),
        (
            lambda: ScoreNet(RefineNet(1, 2, levels=10), LADDER, precondition="ncsn"),
            ValueError,
            "know 10 noise levels, but the schedule has 30",
        ),
        (lambda: ScoreNet(RefineNet(1, 2), LADDER, precondition="ncsn"), ValueError, "does not fit this RefineNet"),
        (lambda: ScoreNet(RefineNet(1, 2, levels=30), LADDER), ValueError, "does not fit this RefineNet"),
    ],
)
def test_parts_that_do_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- An image as a condition


def _conditional():
    torch.manual_seed(0)
    net = ScoreNet.unet(3, 8, widths=(4, 8), layers_per_block=1, condition_channels=1, schedule=LADDER)
    for parameter in net.parameters():  # the zeros of the beginning would hide what the network sees
        nn.init.normal_(parameter, std=0.3)
    return net


def test_an_image_condition_is_seen_in_the_units_of_the_row(rng):
    """In [-1, 1] beside a centered image, without noise and its scale; as it is beside one that is not."""
    seen = []

    def function(x, c_noise, condition):
        seen.append(condition)
        return x

    x, image = torch.rand(2, 1, 4, 4, generator=rng), torch.rand(2, 2, 4, 4, generator=rng)
    ScoreNet(Backbone(function), LADDER)(x, 0.1, image)
    ScoreNet(Backbone(function), LADDER, value_range=(0, 2))(x, 3.0, image)
    ScoreNet(Backbone(function), LADDER, value_range=None)(x, 0.1, image)
    ScoreNet(Backbone(function), LADDER, precondition="ncsnv2")(x, 0.1, image)
    for found, expected in zip(seen, [2 * image - 1, image - 1, image, image], strict=True):
        torch.testing.assert_close(found, expected, check_dtype=False)
    ScoreNet(Backbone(function, torch.float32), LADDER)(x.double(), 0.1, image.double())
    assert seen[-1].dtype == torch.float32


def test_the_condition_of_an_image_is_its_own(rng):
    net = _conditional()
    x, image = torch.rand(2, 3, 8, 8, generator=rng), torch.rand(2, 1, 8, 8, generator=rng)
    other = torch.stack([image[0], 1 - image[1]])
    a, b = net(x, 0.2, image), net(x, 0.2, other)
    torch.testing.assert_close(a[0], b[0])
    assert (a[1] - b[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("net", "condition", "error", "message"),
    [
        (_conditional, None, ValueError, r"4 channels, and x has 3: .*Pass condition=, float \(N, 1, H, W\)"),
        (_conditional, torch.zeros(2, 3, 8, 8), ValueError, r"of shape \(2, 1, 8, 8\), got \(2, 3, 8, 8\)"),
        (_conditional, torch.zeros(1, 1, 8, 8), ValueError, r"x's batch and size, .*got \(1, 1, 8, 8\)"),
        (_conditional, torch.zeros(2, 1, 4, 8), ValueError, r"x's batch and size, .*got \(2, 1, 4, 8\)"),
        (
            lambda: ScoreNet.unet(3, 8, widths=(4, 8)),
            torch.zeros(2, 1, 8, 8),
            ValueError,
            "takes no image as its condition.*Build it with condition_channels=",
        ),
        (lambda: ScoreNet.ncsnv2(3, 8, width=2), torch.zeros(2, 1, 8, 8), TypeError, "takes no condition"),
    ],
)
def test_conditions_that_do_not_fit(net, condition, error, message, rng):
    with pytest.raises(error, match=message):
        net()(torch.rand(2, 3, 8, 8, generator=rng), 0.1, condition)
