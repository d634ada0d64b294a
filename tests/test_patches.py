"""U-Nets on patches of pixels, which compute on a coarser grid."""

import json

import pytest
import torch
import torch.nn.functional as F

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.nets import FAMILIES, UNet
from scorematch.nets.inference import InferenceScore, part_size
from scorematch.sampling import ODESampler
from tests.helpers import run

SCHEDULE = NoiseSchedule.geometric(50, 0.01, 10)
KINDS = {
    "2": {"patch": 2},
    "4": {"patch": 4},
    "with pixels": {"patch": 2, "pixel_channels": 8},
    "with pixel layers": {"patch": 2, "pixel_channels": 4, "pixel_layers": 3},
    "condition": {"patch": 2, "pixel_channels": 4, "condition_channels": 3},
    "classes": {"patch": 2, "classes": 3},
}


def _net(kind, **options):
    """A small network in which all weights are random."""
    torch.manual_seed(0)
    net = ScoreNet.unet(3, 16, widths=(8, 16), layers_per_block=1, schedule=SCHEDULE, **KINDS[kind], **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net.eval()


def _inputs(kind, rng, n=2, size=16):
    x = torch.rand(n, 3, size, size, generator=rng)
    condition = {"condition": torch.rand(n, 3, size, size, generator=rng), "classes": torch.arange(n)}.get(kind)
    return x, condition


def _small(in_channels=3, out_channels=3, **options):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet(in_channels, out_channels, block_out_channels=(8, 16), norm_num_groups=4, **{**blocks, **options})


def test_a_unet_with_patches_equals_a_unet_of_unshuffled_pixels(rng):
    torch.manual_seed(0)
    net, inner = _small(patch=2), _small(12, 12)
    inner.load_state_dict(net.state_dict())
    x, c_noise = torch.rand(2, 3, 16, 12, generator=rng), torch.tensor([0.3, -1.0])
    assert torch.equal(net(x, c_noise), F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2), c_noise), 2))


def test_an_image_condition_is_divided_into_patches_too(rng):
    torch.manual_seed(0)
    net = _small(4, 1, patch=2, pixel_channels=4)
    x, beside = torch.rand(2, 1, 8, 8, generator=rng), torch.rand(2, 3, 8, 8, generator=rng)
    c_noise = torch.zeros(2)
    assert torch.equal(net(x, c_noise, beside), net(torch.cat([x, beside], dim=1), c_noise))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_is_the_exact_score_of_a_gaussian(kind, rng):
    net = ScoreNet.unet(3, 16, widths=(8, 16), layers_per_block=1, **KINDS[kind])
    x, condition = _inputs(kind, rng)
    s = 2 * 0.3
    expected = -2 * (2 * x - 1) / (s**2 + 0.25)  # of N(0, 1/4) in the units of images in [-1, 1]
    torch.testing.assert_close(net(x, 0.3, condition), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind, rng):
    net = _net(kind)
    x, condition = _inputs(kind, rng)
    dsm_loss(net, x, condition=condition, generator=0).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_blocks_at_full_resolution_treat_all_pixels_alike(rng):
    """If the output of the patches is zero, shifting x by one pixel shifts the output by one pixel."""
    torch.manual_seed(0)
    net = _small(patch=2, pixel_channels=8)
    for parameter in net.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    for norm in (net.pixel_block_in.norm1, net.pixel_block_in.norm2, net.pixel_block_out.norm1):
        norm.forward = lambda h, *_: h  # norms are left out, since their statistics depend on the whole image
    net.pixel_block_out.norm2.forward = net.pixel_norm_out.forward = lambda h, *_: h
    x, c_noise = torch.rand(1, 3, 24, 24, generator=rng), torch.zeros(1)
    shifted = net(x.roll(1, dims=3), c_noise)
    inside = (..., slice(None), slice(8, -8))  # away from the border, which is padded with zeros
    torch.testing.assert_close(shifted[inside], net(x, c_noise).roll(1, dims=3)[inside])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), pytest.param(torch.bfloat16, 2.5e-2, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_the_inference_copy_computes_the_same_score(kind, dtype, tolerance, rng, monkeypatch):
    monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: dtype)
    net = _net(kind)
    fast = net.inference_copy()
    assert isinstance(fast, InferenceScore)
    x, condition = _inputs(kind, rng)
    for sigma in (0.3, 5.0):
        expected = net(x, sigma, condition)
        assert (fast(x, sigma, condition) - expected).norm() <= tolerance * expected.norm()


def test_convolutions_at_the_image_stay_in_float32(monkeypatch):
    monkeypatch.setattr("scorematch.nets.inference.native_dtype", lambda device: torch.bfloat16)
    for kind, kept in [("2", {"conv_in", "conv_out"}), ("with pixels", {"pixel_in", "pixel_out"})]:
        weights = _net(kind).inference_copy()._backbone.named_parameters()
        low = {name.removesuffix(".weight") for name, weight in weights if weight.dtype == torch.bfloat16}
        assert len(low) > 10 and not low & kept
        assert ("conv_in" in low) == (kind == "with pixels")
        assert not [name for name in low if "time" in name or "norm" in name]


def test_parts_of_a_batch_depend_on_the_resolution_of_the_features():
    unet, x = FAMILIES["unet"], torch.empty(10_000, 3, 32, 32)
    sizes = {
        patch: part_size(unet.width(_small(patch=patch, pixel_channels=pixels)), x)
        for patch, pixels in [(1, 0), (2, 0), (4, 0)]
    }
    assert sizes[2] == 4 * sizes[1] and sizes[4] == 8 * sizes[1]  # with patch 4 the width is rounded up to 1 per pixel
    assert part_size(unet.width(_small(patch=2, pixel_channels=16)), x) == sizes[1] / 2


@pytest.mark.parametrize("kind", ["with pixel layers", "condition", "classes"])
def test_a_unet_with_patches_is_saved_in_the_layout_of_this_package(kind, tmp_path, rng):
    net = _net(kind)
    net.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = ScoreNet.from_pretrained(tmp_path)
    x, condition = _inputs(kind, rng)
    with torch.no_grad():
        assert torch.equal(loaded(x, 0.3, condition), net(x, 0.3, condition))
    assert loaded.config == net.config and loaded.conditioning == net.conditioning


def test_a_ddpm_with_patches_is_not_saved_in_the_layout_of_diffusers(tmp_path):
    schedule = NoiseSchedule.from_betas([0.1, 0.2])
    names = []
    for patch in (1, 2):
        net = ScoreNet.unet(1, 8, widths=(4, 4), patch=patch, schedule=schedule, precondition="ddpm")
        net.save_pretrained(tmp_path / str(patch))
        names.append({path.name for path in (tmp_path / str(patch)).iterdir()})
    assert "diffusion_pytorch_model.safetensors" in names[0] and "model.safetensors" in names[1]


def test_a_unet_with_patches_can_be_sampled():
    images = run(ODESampler(_net("with pixels"), levels=3), 2, generator=0)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_the_configuration_without_patches_has_no_key_patch():
    assert "patch" not in ScoreNet.unet(1, 8, widths=(4, 4)).config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_channels": 8}, "pixel_channels must be a multiple of 4 .* and 0 for patch=1, got 8 with"),
        ({"patch": 2, "pixel_channels": 6}, "pixel_channels must be a multiple of 4 up to 64, .* got 6 with patch=2"),
        ({"patch": 2, "pixel_layers": 2}, "pixel_layers must be 1 without pixel_channels, got 2. Pass pixel_channels"),
        ({"patch": 2, "pixel_channels": 68}, "a multiple of 32 above, .* got 68 with patch=2"),
        (
            {"patch": 2, "down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2},
            "patch must be 1 for blocks with Skip in their names, got 2",
        ),
    ],
)
def test_unsupported_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        _small(**options)


def test_an_image_smaller_than_the_largest_stride_raises(rng):
    with pytest.raises(ValueError, match="every side of x must be at least 8, the largest stride, got 7x16"):
        _net("4")(torch.rand(1, 3, 7, 16), 0.3)


@pytest.mark.parametrize(
    ("key", "value"), [("patch", 0), ("patch", "two"), ("pixel_channels", -4), ("pixel_layers", 0)]
)
def test_a_configuration_with_invalid_patches_raises(key, value, tmp_path):
    _net("2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=f"config.json: {key} must be"):
        ScoreNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("small", "large", "possible"), [(4, 8, True), (4, 64, True), (4, 68, False), (0, 8, False), (8, 4, False)]
)
def test_the_channels_of_pixels_that_may_be_added_to_a_trained_network(small, large, possible):
    """At least one exists already, and the groups of their norms keep their size."""
    smaller, larger = ({"block_out_channels": [8], "pixel_channels": channels} for channels in (small, large))
    assert ("pixel_channels" in FAMILIES["unet"].growth(smaller, larger)) is possible
