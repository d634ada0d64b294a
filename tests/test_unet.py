"""The U-Net compared with that of diffusers with the same random weights, and properties of its own."""

import copy
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from scorematch import AnnealedLangevinSampler, NoiseSchedule, ScoreNet
from scorematch.nets import FAMILIES
from scorematch.nets.blocks import Attention, ResidualBlock
from scorematch.nets.family import structure
from scorematch.nets.unet import UNET, UNet
from scorematch.pretrained.weights import fill
from tests.helpers import on_meta, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers import UNet2DConditionModel, UNet2DModel

PAIRS = {
    "DownBlock2D": "UpBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "SkipDownBlock2D": "SkipUpBlock2D",
    "AttnSkipDownBlock2D": "AttnSkipUpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
}
OPTIONS = {
    "plain": {},
    "scale shift": {"resnet_time_scale_shift": "scale_shift"},
    "resampling by residual blocks": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "DDPM": {
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    },
    "NCSN++": {"time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5, "attention_head_dim": None},
    "classes": {"num_class_embeds": 5, "attn_norm_num_groups": 4},
    "width of the embedding": {"time_embedding_dim": 20, "num_class_embeds": 2},
    "no attention in the middle": {"add_attention": False, "act_fn": "gelu", "center_input_sample": True},
    "two layers": {"layers_per_block": 2},
}

# The configurations of the published networks, and their numbers of parameters.
_DDPM = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
_NCSNPP = {
    "attention_head_dim": None,
    "mid_block_scale_factor": 1.41421356237,
    "norm_eps": 1e-6,
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
}
PUBLISHED = {
    "google/ddpm-cifar10-32": (
        35_746_307,
        {
            **_DDPM,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "google/ddpm-celebahq-256": (
        113_673_219,
        {
            **_DDPM,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        },
    ),
    "google/ncsnpp-celebahq-256": (
        65_574_549,
        {
            **_NCSNPP,
            "block_out_channels": (128, 128, *[256] * 5),
            "down_block_types": (*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2),
            "up_block_types": (*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4),
        },
    ),
    "newsyctw/NCSN_CIFAR10_my": (
        61_894_924,
        {
            **_NCSNPP,
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 4,
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2),
            "up_block_types": (*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        },
    ),
}


def _pair(config):
    """diffusers' network and ours with equal random weights. All weights are random, also those of the norms."""
    theirs = UNet2DModel(**config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim == 1:
                p.copy_(0.5 + 0.3 * torch.randn(p.shape, generator=rng))
            else:
                p.copy_(torch.randn(p.shape, generator=rng) / p[0].numel() ** 0.5)
    ours = UNet(**{key: value for key, value in config.items() if key != "sample_size"}).eval()
    weights = dict(theirs.state_dict())
    weights.pop("time_proj.W", None)  # a duplicate of time_proj.weight
    ours.load_state_dict(weights)
    return theirs, ours


def _difference(config, size, batch=2):
    theirs, ours = _pair(config)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, size, size, generator=rng)
    fourier = config.get("time_embedding_type") == "fourier"
    t = torch.tensor([0.37, 41.5] if fourier else [3.0, 412.37])[:batch]
    classes = torch.arange(batch) if "num_class_embeds" in config else None
    with torch.no_grad():
        expected = theirs(x, t, class_labels=classes).sample
        found = ours(x, t.log() if fourier else t, classes)
    if fourier:  # in diffusers the network divides by sigma, here ScoreNet does
        found = found / t.view(-1, 1, 1, 1)
    return float((found - expected).norm() / expected.norm())


# Every option with a block with and without skips; the other pairs are slow tests.
QUICK = {"AttnDownBlock2D": OPTIONS}
FEW = ("plain", "NCSN++")


@pytest.mark.parametrize(
    ("block", "option"),
    [
        (block, option) if option in QUICK.get(block, FEW) else pytest.param(block, option, marks=pytest.mark.slow)
        for block, option in itertools.product(PAIRS, OPTIONS)
    ],
)
def test_every_kind_of_block_equals_that_of_diffusers(block, option):
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "down_block_types": (block, block),
        "up_block_types": (PAIRS[block], PAIRS[block]),
        **OPTIONS[option],
    }
    assert _difference(config, 8) < 1e-5


def test_mixed_kinds_of_blocks_equal_those_of_diffusers():
    config = {
        "block_out_channels": (16, 32, 48),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D", "AttnUpBlock2D"),
    }
    assert _difference(config, 8) < 1e-5


def test_other_numbers_of_layers_at_each_scale_equal_those_of_diffusers(rng):
    """Its U-Net for text has them too; without attention, it is the same network."""
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16, 24),
        "norm_num_groups": 4,
        "layers_per_block": [2, 1, 3],
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    }
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config, mid_block_type="UNetMidBlock2D").eval()
    theirs.mid_block = UNet2DModel(**{**config, "layers_per_block": 1}, add_attention=False).mid_block  # of two blocks
    ours = UNet(**config, add_attention=False).eval()
    fill(ours, theirs.state_dict(), "the weights of diffusers")
    x, t = torch.randn(2, 3, 8, 8, generator=rng), torch.tensor([3.0, 412.37])
    with torch.no_grad():
        torch.testing.assert_close(ours(x, t), theirs(x, t, encoder_hidden_states=None).sample)


def test_one_number_of_layers_for_all_scales_may_be_a_list(tmp_path):
    """It is the configuration that diffusers reads; different numbers are kept as a list, also in a file."""
    options = {"widths": (4, 8), "precondition": "ddpm"}
    one, *equal = (ScoreNet.unet(1, 8, layers_per_block=n, **options) for n in (2, [2, 2], np.int64(2)))
    assert all(net.config == one.config for net in equal) and one.config["layers_per_block"] == 2
    net = ScoreNet.unet(1, 8, layers_per_block=(2, 1), **options)
    net.save_pretrained(tmp_path)
    again = ScoreNet.from_pretrained(tmp_path)
    assert again.config["layers_per_block"] == [2, 1]
    config = {key: again.config[key] for key in UNET.keys if key in again.config}
    for layers in ([2, 1], np.array([2, 1])):
        assert structure(UNet(**{**config, "layers_per_block": layers})) == structure(again.backbone)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_weights_of_diffusers(name):
    parameters, config = PUBLISHED[name]
    with on_meta():
        theirs, ours = UNet2DModel(**config), UNet(**config)
    assert sum(p.numel() for p in ours.parameters()) == parameters
    shapes = {key: tuple(p.shape) for key, p in theirs.state_dict().items() if key != "time_proj.W"}
    assert {key: tuple(p.shape) for key, p in ours.state_dict().items()} == shapes


@pytest.mark.parametrize("share", [4, pytest.param(1, marks=pytest.mark.slow)])  # of the published widths
@pytest.mark.parametrize("name", ["google/ddpm-cifar10-32", "google/ncsnpp-celebahq-256"])
def test_published_networks_equal_those_of_diffusers(name, share):
    _, config = PUBLISHED[name]
    config = {**config, "block_out_channels": [width // share for width in config["block_out_channels"]]}
    assert _difference(config, 64 if "256" in name else 32, batch=1) < 1e-5


@pytest.mark.parametrize("beside", [0, 2])
@torch.no_grad()
def test_ncsnpp_of_gray_images_equals_diffusers_with_summed_weights(beside, rng):
    """diffusers' Skip blocks need RGB; for a gray image repeated three times, weights can be summed over channels."""
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    config = {**_NCSNPP, **blocks, "block_out_channels": (8, 16), "layers_per_block": 1, "add_attention": False}
    theirs, full = _pair(config)
    ours = UNet(1 + beside, 1, **config).eval()
    weights = full.state_dict()
    for name, tensor in weights.items():
        reads = name == "conv_in.weight" or (name.startswith("down") and name.endswith("skip_conv.weight"))
        if reads and not beside:
            weights[name] = tensor.sum(1, keepdim=True)
        if name.startswith("conv_out") or (name.startswith("up") and "skip_conv" in name):
            weights[name] = tensor[:1]
    ours.load_state_dict(weights)
    x, condition = torch.randn(2, 1, 8, 8, generator=rng), torch.randn(2, beside, 8, 8, generator=rng)
    t = torch.tensor([0.37, 41.5])
    rgb = torch.cat([x, condition], dim=1) if beside else x.expand(-1, 3, -1, -1)
    expected = theirs(rgb, t).sample[:, :1] * t.view(-1, 1, 1, 1)
    found = ours(x, t.log(), condition if beside else None)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


# -- The filter of NCSN++


def _ncsnpp(channels=3, **options):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    config = {**_NCSNPP, **blocks, "block_out_channels": (8, 8), "layers_per_block": 1, "add_attention": False}
    return UNet(channels, channels, **{**config, **options}).eval()


@pytest.mark.slow
@torch.no_grad()
def test_the_filter_is_not_stored_and_follows_device_and_dtype(rng):
    net, x, c_noise = _ncsnpp(), torch.rand(2, 3, 8, 8, generator=rng), torch.tensor([0.3, 1.0])
    assert not [name for name in net.state_dict() if "kernel" in name]
    kernels = {name: kernel for name, kernel in net.named_buffers() if name.endswith("kernel")}
    assert len(kernels) == 2  # one for the image and one for the features
    line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    assert all(torch.equal(kernel[0, 0], line.outer(line)) for kernel in kernels.values())
    expected = net(x, c_noise)
    assert torch.equal(copy.deepcopy(net)(x, c_noise), expected)
    torch.testing.assert_close(copy.deepcopy(net).double()(x.double(), c_noise.double()).float(), expected)
    assert (copy.deepcopy(net).bfloat16()(x.bfloat16(), c_noise) - expected).norm() < 0.05 * expected.norm()
    moved = copy.deepcopy(net).to("meta")
    assert moved(x.to("meta"), c_noise.to("meta")).is_meta
    with on_meta():
        empty = _ncsnpp().eval()
    assert all(kernel.is_meta for kernel in empty.buffers())
    fill(empty, net.state_dict(), "the test")
    assert torch.equal(empty(x, c_noise), expected)


# -- Options that diffusers lacks


def _pair_of_scales(**options):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
    config = {**blocks, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    net = UNet(**{**config, "attention_head_dim": 4, **options})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape) / max(1, parameter[0].numel()) ** 0.5)
    return net.eval()


@pytest.mark.parametrize("residual", [*itertools.product([False, True], repeat=2)], ids=str)
def test_blocks_with_attention_resample_by_residual_blocks_on_the_way_that_asks_for_it(residual):
    down, up = ("resnet" if each else "conv" for each in residual)
    net = _pair_of_scales(downsample_type=down, upsample_type=up)
    resamplers = net.down_blocks[0].downsamplers[0], net.up_blocks[0].upsamplers[0]
    assert tuple(isinstance(each, ResidualBlock) for each in resamplers) == residual


def _norms(net):
    return {name: module for name, module in net.named_modules() if isinstance(module, nn.GroupNorm)}


@torch.no_grad()
def test_a_number_of_heads_is_a_width_of_heads(rng):
    x, step = torch.randn(2, 3, 8, 8, generator=rng), torch.tensor([3.0, 5.5])
    expected = _pair_of_scales(attention_head_dim=4)(x, step)
    assert torch.equal(_pair_of_scales(attention_heads=[2, 4])(x, step), expected)
    assert torch.equal(_pair_of_scales(attention_heads=[2, 4], attention_heads_up=[2, 4])(x, step), expected)
    mixed = _pair_of_scales(attention_heads=[2, 8], attention_heads_up=[1, 4])
    heads = {name: module.heads for name, module in mixed.named_modules() if isinstance(module, Attention)}
    places = {"down_blocks.0": 2, "down_blocks.1": 8, "mid_block": 8, "up_blocks.0": 4, "up_blocks.1": 1}
    for place, count in places.items():
        assert {heads[name] for name in heads if name.startswith(place)} == {count}
    weights = {name: tensor.shape for name, tensor in mixed.state_dict().items()}
    assert weights == {name: tensor.shape for name, tensor in _pair_of_scales().state_dict().items()}


@torch.no_grad()
def test_a_factor_of_the_time_step(rng):
    """As of a network with 4000 steps that was trained with those of 1000."""
    x, step = torch.randn(2, 3, 8, 8, generator=rng), torch.tensor([3999.0, 50.5])
    assert torch.equal(_pair_of_scales(time_factor=0.25)(x, step), _pair_of_scales()(x, step / 4))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Attn", "Resnet"])
def test_a_quarter_of_the_channels_is_the_number_of_groups(kind, rng):
    blocks = ("AttnDownBlock2D", "AttnUpBlock2D")
    if kind == "Resnet":
        blocks = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    options = {"down_block_types": blocks[:1] * 2, "up_block_types": blocks[1:] * 2, "norm_num_groups": None}
    for widths in ((8, 24), (128, 128)):
        net = UNet(block_out_channels=widths, layers_per_block=1, attention_head_dim=4, **options).eval()
        norms = _norms(net)
        assert len(norms) > 15
        assert all(norm.num_groups == min(norm.num_channels // 4, 32) for norm in norms.values())
    fixed = UNet(
        block_out_channels=widths, layers_per_block=1, attention_head_dim=4, **{**options, "norm_num_groups": 32}
    ).eval()
    fixed.load_state_dict(net.state_dict())
    x, step = torch.randn(1, 3, 4, 4, generator=rng), torch.tensor([3.0])
    assert torch.equal(net(x, step), fixed(x, step))


@torch.no_grad()
@pytest.mark.parametrize("widths", [(4,), (8, 8), (32,)])
def test_the_output_depends_on_the_noise_level(widths, rng):
    """A group norm of single channels would remove what the embedding adds to them."""
    backbone = ScoreNet.unet(1, 8, widths=widths, attention=[False] * len(widths)).backbone
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3, generator=rng)
    x, levels = torch.randn(1, 1, 8, 8, generator=rng), torch.tensor([[-1.0], [1.0]])
    low, high = (backbone(x, level) for level in levels)
    assert (low - high).norm() > 1e-3 * low.norm()


def test_the_sizes_of_the_embedding(rng):
    """As of EDM's ADM, whose first scale may be wider than the network that its embedding is made for."""
    net = _pair_of_scales(time_proj_dim=6, time_embedding_dim=10, num_class_embeds=3, null_class=True)
    assert net.time_embedding.linear_1.weight.shape == (10, 6) and net.time_embedding.linear_2.weight.shape == (10, 10)
    assert net.class_embedding.weight.shape == (4, 10)
    assert net.down_blocks[0].resnets[0].time_emb_proj.in_features == 10
    features = net.time_proj(torch.tensor([7.0]))[0]
    expected = [f(7 * 10_000 ** (-i / 3)) for f in (math.cos, math.sin) for i in range(3)]
    torch.testing.assert_close(features, torch.tensor(expected))
    fourier = _pair_of_scales(time_embedding_type="fourier", time_proj_dim=6)
    assert fourier.time_proj.weight.shape == (3,) and fourier.time_embedding.linear_1.in_features == 6


@pytest.mark.parametrize(
    "options",
    [
        {"attention_heads": [2, 4]},
        {"attention_heads_up": [2, 4]},
        {"time_factor": 0.25},
        {"time_proj_dim": 6},
        {"num_class_embeds": 3, "null_class": True},
        {"norm_num_groups": None},
        {"layers_per_block": [2, 1]},
        {},
        {"time_embedding_dim": 20},
    ],
    ids=str,
)
def test_the_layout_of_diffusers_is_for_what_diffusers_computes(options, tmp_path):
    """With an option that it lacks the network is written in this package's own layout, which diffusers refuses."""
    config = {
        "block_out_channels": [8, 16],
        "down_block_types": ["AttnDownBlock2D"] * 2,
        "up_block_types": ["AttnUpBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        **options,
    }
    family = FAMILIES["unet"]
    own = bool(options.keys() - {"time_embedding_dim"})
    assert family.diffusers_class(config, "ddpm") == (None if own else "UNet2DModel")
    skips = {"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2}
    if "norm_num_groups" in options:  # in these blocks diffusers has it too
        assert family.diffusers_class({**config, **skips}, "ddpm") == "UNet2DModel"
    defaults = {"attention_heads": None, "time_factor": 1.0, "null_class": False, "patch": 1}
    assert family.diffusers_class({**defaults, **config}, "ddpm") == family.diffusers_class(config, "ddpm")


# -- Attention


@pytest.mark.parametrize(("head_width", "folds"), [(8, True), (4, False), (6, False)])
@torch.no_grad()
def test_folded_attention_computes_the_same(head_width, folds, rng):
    """One head as wide as the features is folded to two projections; other attention layers do not change."""
    attention = Attention(8, head_width=head_width, groups=2, eps=1e-5)
    for parameter in attention.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng))
    folded = copy.deepcopy(attention)
    folded.fold()
    linear = [module for module in folded.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == (2 if folds else 4)
    x = torch.randn(3, 8, 4, 5, generator=rng)
    torch.testing.assert_close(folded(x), attention(x), rtol=1e-4, atol=1e-4)


# -- Gradients, conditions and precisions


def test_gradient_reaches_every_parameter(rng):
    net = UNet(
        2,
        2,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=3,
    )
    net(torch.rand(3, 2, 8, 12, generator=rng), torch.tensor([0.1, 1.0, 2.5]), torch.tensor([0, 1, 2])).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name


def test_an_image_condition_is_concatenated_with_x(rng):
    net = UNet(
        4,
        1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    x, beside = torch.rand(2, 1, 6, 7, generator=rng), torch.rand(2, 3, 6, 7, generator=rng)
    c_noise = torch.zeros(2)
    assert torch.equal(net(x, c_noise, beside), net(torch.cat([x, beside], dim=1), c_noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_networks_of_other_precisions_are_accurate(dtype, rng):
    torch.manual_seed(0)
    net = UNet(
        1,
        1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    x, c_noise = torch.rand(2, 1, 8, 8, generator=rng), torch.tensor([0.5, 2.0])
    exact = net.double()(x.double(), c_noise.double())
    found = net.to(dtype)(x.to(dtype), c_noise if dtype == torch.bfloat16 else c_noise.double())
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= (0.05 if dtype == torch.bfloat16 else 1e-12) * exact.abs().max()


# -- Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": ("CrossAttnDownBlock2D",)}, "down block must be one of .*, got 'CrossAttnDownBlock2D'"),
        ({"up_block_types": ("KUpBlock2D",)}, "up block must be one of 'UpBlock2D', .*, got 'KUpBlock2D'"),
        ({"up_block_types": ()}, "one entry per scale, got 1, 1 and 0"),
        ({"time_embedding_type": "learned"}, "time_embedding_type must be one of .*, got 'learned'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be one of .*, got 'spatial'"),
        ({"downsample_type": "fir"}, "downsample_type must be one of .*, got 'fir'"),
        ({"upsample_type": "fir"}, "upsample_type must be one of .*, got 'fir'"),
        ({"act_fn": "tanh"}, "act_fn must be one of .*, got 'tanh'"),
        ({"attention_heads": [3]}, r"attention_heads must have one entry .* width of the scale, \[8\], got \[3\]"),
        ({"attention_head_dim": 9}, "attention_head_dim must be at most 8, the width of the scale, got 9"),
        ({"attention_heads": [1, 1]}, r"attention_heads must have one entry per scale .* got \[1, 1\]"),
        ({"attention_heads_up": []}, r"attention_heads_up must have one entry per scale .* got \[\]"),
        ({"null_class": True}, "null_class=True needs classes"),
        ({"time_embedding_type": "fourier", "time_proj_dim": 5}, "time_proj_dim, must be even, got 5"),
    ],
)
def test_unsupported_options_raise(changes, message):
    config = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.raises(ValueError, match=message):
        UNet(**{**config, "norm_num_groups": 4, **changes})


def _small(**changes):
    return UNet(
        3,
        3,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        **changes,
    )


@pytest.mark.parametrize(
    ("net", "shape", "condition", "message"),
    [
        (_small, (1, 5, 8, 8), None, r"must have 3 channels in all, got x of shape \(1, 5, 8, 8\).$"),
        (_small, (1, 1, 8, 8), None, r"must have 3 channels in all, got x of shape \(1, 1, 8, 8\).$"),
        (
            _small,
            (1, 8, 9, 3),
            None,
            r"x and the conditioning image.* must have 3 channels in all, got x of shape \(1, 8, 9, 3\)",
        ),
        (_small, (3, 8, 8), None, r"must be images \(N, 3, H, W\), got shape \(3, 8, 8\)"),
        (_small, (1, 1, 8, 8), torch.zeros(1, 3, 8, 8), r"3 channels in all.* a condition of shape \(1, 3, 8, 8\)"),
        (_small, (2, 1, 8, 8), torch.zeros(1, 2, 8, 8), r"of shape \(2, 2, 8, 8\), got \(1, 2, 8, 8\)"),
        (_small, (1, 1, 8, 8), torch.zeros(1, 2, 4, 8), r"of shape \(1, 2, 8, 8\), got \(1, 2, 4, 8\)"),
        (_small, (1, 1, 8, 8), torch.zeros(2), r"3 channels in all, .* and a condition of shape \(2,\)"),
        (_small, (1, 1, 8, 8), torch.tensor([1]), r"conditioning image, .* must have 3 channels in all"),
        (_small, (1, 3, 8, 1), None, "every side of x must be at least 2, the largest stride, got 8x1"),
        (_small, (1, 3, 8, 8), torch.tensor([1]), "takes no classes"),
        (lambda: _small(num_class_embeds=4), (1, 3, 8, 8), None, "takes classes as its condition: pass condition="),
        (
            lambda: _small(num_class_embeds=4),
            (1, 3, 8, 8),
            torch.tensor([1, 2]),
            r"shape \(1,\) like the batch, got \(2,\)",
        ),
        (_small, (1, 3, 8, 8), torch.zeros(1, 2, 8, 8), "takes no image as its condition"),
    ],
)
def test_invalid_input_raises(net, shape, condition, message):
    with pytest.raises(ValueError, match=message):
        net()(torch.zeros(shape), torch.zeros(shape[0]), condition)


def test_a_network_of_diffusers_as_backbone_raises(rng):
    """Its output is not a tensor. The error names ``ScoreNet.from_diffusers``, also if a sampler calls the network."""
    config = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    net = ScoreNet(
        UNet2DModel(sample_size=8, norm_num_groups=4, add_attention=False, **config),
        NoiseSchedule([1.0, 0.1]),
        sample_shape=(3, 8, 8),
    )
    message = r"got UNet2DOutput. For a UNet2DModel of diffusers use ScoreNet.from_diffusers\(unet, scheduler\)"
    with pytest.raises(TypeError, match=message):
        net(torch.rand(2, 3, 8, 8, generator=rng), 0.1)
    with pytest.raises(TypeError, match=message):
        run(AnnealedLangevinSampler(net), 2)
