"""The RefineNets of NCSN and NCSNv2 compared with the published networks, and instance normalization++."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scorematch import ScoreNet
from scorematch.nets.layers import ConditionalInstanceNormPlus, InstanceNormPlus
from scorematch.nets.refinenet import RefineNet
from tests.helpers import HostReads, on_meta

PUBLISHED = {  # name -> (channels, width, depth, levels)
    "ncsn_mnist": (1, 8, "standard", 10),
    "ncsnv2": (3, 8, "standard", None),
    "ncsnv2deeper": (3, 4, "deeper", None),
}


@pytest.mark.parametrize(
    ("channels", "width", "depth", "levels", "parameters", "tensors"),
    [
        (1, 64, "standard", 10, 7_638_657, 173),
        (3, 128, "standard", 10, 30_117_635, 173),
        (3, 128, "standard", 232, 39_750_659, 173),
        (3, 128, "standard", None, 29_694_083, 153),
        (3, 128, "deeper", None, 83_445_379, 191),
        (3, 128, "deepest", None, 94_132_611, 229),
        (3, 128, "deeper", 10, 84_183_811, 217),
    ],
)
def test_published_numbers_of_parameters_and_tensors(channels, width, depth, levels, parameters, tensors):
    with on_meta():
        net = RefineNet(channels, width, depth=depth, levels=levels)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.state_dict()) == tensors


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_give_the_published_outputs(name, published):
    """The published weights are loaded by name; outputs agree for square, oblong, constant and single images."""
    fixture = published(name)
    channels, width, depth, levels = PUBLISHED[name]
    net = RefineNet(channels, width, depth=depth, levels=levels)
    net.load_state_dict(fixture["weights"])
    for case in fixture["cases"]:
        with torch.no_grad():
            out = net(case["x"], case["labels"])
        if levels is None:
            out = out / fixture["sigmas"][case["labels"]][:, None, None, None]
        limit = 2e-5 * case["out"].abs().amax((1, 2, 3))
        assert ((out - case["out"]).abs().amax((1, 2, 3)) <= limit).all()


def test_weight_names_of_the_deepest_network():
    with on_meta():
        shapes = {name: tuple(p.shape) for name, p in RefineNet(3, 4, depth="deepest").state_dict().items()}
    assert shapes["res31.0.conv2.conv.weight"] == (8, 8, 3, 3)
    assert shapes["res4.0.shortcut.weight"] == (16, 8, 3, 3)
    assert shapes["refine31.msf.convs.1.weight"] == (8, 8, 3, 3)
    assert shapes["refine2.msf.convs.0.weight"] == (8, 16, 3, 3)
    assert shapes["refine5.output_convs.3_2_conv.weight"] == (4, 4, 3, 3)
    assert "refine1.msf.convs.0.weight" not in shapes


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 6])
def test_gradient_reaches_every_parameter(levels, rng):
    net = RefineNet(2, 4, depth="deepest", levels=levels)
    x = torch.rand(2, 2, 16, 16, generator=rng)
    net(x, torch.tensor([0.5, 4.25]) if levels else None).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.slow
@given(
    height=st.integers(2, 7), width=st.integers(2, 7), batch=st.integers(1, 3), channels=st.sampled_from([1, 2, 3, 5])
)
@settings(deadline=None, max_examples=10)
def test_images_of_any_size_that_can_be_halved(height, width, batch, channels):
    net = RefineNet(channels, 2, levels=3)
    x = torch.rand(batch, channels, 2 * height, 2 * width)
    assert net(x, torch.tensor(1.5)).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, 4])
def test_images_of_a_batch_do_not_depend_on_each_other(levels, rng):
    net = RefineNet(1, 4, levels=levels).double()
    x = torch.rand(3, 1, 8, 8, generator=rng, dtype=torch.float64)
    position = torch.tensor([0.0, 1.5, 3.0]) if levels else None
    together = net(x, position)
    alone = [net(x[i : i + 1], None if position is None else position[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["ncsn", "ncsnv2"])
def test_networks_of_other_precisions_are_accurate(family, dtype, rng):
    torch.manual_seed(0)
    net = getattr(ScoreNet, family)(1, 8, width=8)
    x = torch.rand(2, 1, 8, 8, generator=rng)
    exact = net.double()(x.double(), 0.5)
    approximate = net.to(dtype)(x.to(dtype), 0.5)
    assert approximate.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 60 * torch.finfo(dtype).eps  # rounding in 60 layers
    assert (approximate - exact).abs().max() <= tolerance * exact.abs().max()


# -- The norm


def _published_norm(x, gamma, alpha, beta):
    """The formula of the published code, for one channel at a time in double precision."""
    x, gamma, alpha, beta = x.double(), gamma.double(), alpha.double(), beta.double()
    out = torch.empty_like(x)
    for n in range(len(x)):
        means = x[n].mean((1, 2))
        back = (means - means.mean()) / (means.var(correction=1) + 1e-5).sqrt()
        for c in range(x.shape[1]):
            h = (x[n, c] - means[c]) / (x[n, c].var(correction=0) + 1e-5).sqrt()
            out[n, c] = gamma[n, c] * (h + alpha[n, c] * back[c]) + beta[n, c]
    return out


def test_norm_in_float16_of_large_features(rng):
    """Features of trained networks exceed 256, whose square is above the largest float16."""
    norm = InstanceNormPlus(5)
    x = 1000 * torch.randn(3, 5, 7, 6, generator=rng)
    expected = _published_norm(x.half(), *(p.detach().expand(3, 5) for p in (norm.gamma, norm.alpha, norm.beta)))
    for found in (norm(x.half()), copy.deepcopy(norm).half()(x.half())):
        assert found.dtype == torch.float16
        assert (found - expected).abs().max() < 4 * torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_norm_equals_the_published_formula(offset, rng):
    norm = InstanceNormPlus(5)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1, 0.5, generator=rng)
    x = torch.randn(3, 5, 7, 6, generator=rng) + offset
    x[1, 2] = 0.7 + offset  # a constant channel
    expected = _published_norm(x, *(p.detach().expand(3, 5) for p in (norm.gamma, norm.alpha, norm.beta)))
    # In a constant channel, rounding errors of x are amplified by 1 / sqrt(1e-5) = 316.
    tolerance = 2e-6 + 316 * offset * torch.finfo(torch.float32).eps
    torch.testing.assert_close(norm(x).double(), expected, rtol=2e-6, atol=tolerance)


def test_conditional_norm_takes_a_row_per_image_and_interpolates(rng):
    norm = ConditionalInstanceNormPlus(4, levels=3)
    nn.init.normal_(norm.embed.weight, generator=rng)
    x = torch.randn(4, 4, 6, 6, generator=rng)
    table = norm.embed.weight.detach()
    rows = torch.stack([table[0], table[2], 0.75 * table[0] + 0.25 * table[1], 0.5 * table[1] + 0.5 * table[2]])
    expected = _published_norm(x, *rows.chunk(3, dim=1))
    found = norm(x, torch.tensor([0.0, 2.0, 0.25, 1.5])).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(norm(x, torch.tensor(1)), norm(x, torch.tensor([1, 1, 1, 1])))


@pytest.mark.parametrize("position", [0.0, 1.0, 2.0, 0.25, 1.5, [0.0, 2.0, 1.75]])
def test_rows_are_selected_without_reading_the_position(position, rng):
    """Reading it would make the host wait for CUDA, as indexing a table with a 0-d tensor does."""
    norm = ConditionalInstanceNormPlus(4, levels=3)
    table = nn.init.normal_(norm.embed.weight, generator=rng).detach()
    position = torch.tensor(position)
    lower = position.long()
    upper = (lower + 1).clamp(max=2)
    expected = torch.lerp(table[lower], table[upper], (position - lower)[..., None]).chunk(3, dim=-1)
    with HostReads() as reads:
        found = norm.rows(position)
    assert reads.count == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with HostReads() as reads:
        table[lower]
    assert reads.count == (position.ndim == 0)


def test_norm_is_initialized_as_published():
    torch.manual_seed(0)
    table = ConditionalInstanceNormPlus(500, levels=20).embed.weight.detach()
    assert (table[:, 1000:] == 0).all()
    assert abs(table[:, :1000].mean() - 1) < 1e-3 and abs(table[:, :1000].std() - 0.02) < 1e-3


# -- Bad input


@pytest.mark.parametrize(
    ("depth", "shape", "message"),
    [
        ("standard", (1, 3, 9, 8), "multiples of 2 and at least 4, got 9x8. Crop or pad the images"),
        ("standard", (1, 3, 2, 8), "at least 4, got 2x8"),
        ("deeper", (1, 3, 16, 18), "multiples of 4 and at least 8, got 16x18"),
        ("deepest", (1, 3, 20, 16), "multiples of 8 and at least 16, got 20x16"),
        ("standard", (1, 1, 8, 8), r"images \(N, 3, H, W\), got shape \(1, 1, 8, 8\)"),
        ("standard", (3, 8, 8), r"images \(N, 3, H, W\), got shape \(3, 8, 8\)"),
    ],
)
def test_invalid_image_sizes_raise(depth, shape, message):
    with pytest.raises(ValueError, match=message):
        RefineNet(3, 2, depth=depth)(torch.rand(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 1}, "width at least 2"),
        ({"width": 4, "depth": "deep"}, "depth must be one of 'standard', 'deeper', 'deepest', got 'deep'"),
        ({"width": 4, "levels": 0}, "levels must be at least 1"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        RefineNet(3, **arguments)


def test_a_conditional_network_needs_a_position():
    with pytest.raises(ValueError, match="depend on the noise level: pass position="):
        RefineNet(1, 2, levels=3)(torch.rand(1, 1, 8, 8))
