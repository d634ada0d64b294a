"""NCSN++ and DDPM++: against the published networks, another implementation, the U-Net, and its own laws."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scorematch import NoiseSchedule, ScoreNet, dsm_loss
from scorematch.nets import NCSNPP, UNet
from scorematch.nets.blocks import Attention, Filter, fir_up
from scorematch.nets.precondition import ROWS
from scorematch.sampling import ODESampler
from tests.helpers import on_meta, run

LEVELS = NoiseSchedule.geometric(10, 0.01, 12)


def _random(net):
    """Random weights, none of them special."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name == "time_proj.weight":
                parameter.normal_(0, 2)
            elif parameter.ndim == 1:
                parameter.copy_(0.5 + 0.3 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
    return net.eval()


# -- The published networks


@pytest.mark.parametrize("name", ["ve_ncsnpp", "ve_ncsnpp_skip", "vp_ddpmpp"])
@torch.no_grad()
def test_it_is_the_published_network(name, published, tmp_path):
    """The scores of yang-song/score_sde_pytorch at cb1f359 (Apache-2.0), its small networks with random weights."""
    case = published("ncsnpp")[name]
    backbone = NCSNPP(**case["architecture"])
    backbone.load_state_dict(case["weights"])
    shape = case["x"].shape[1:]
    net = ScoreNet(backbone, LEVELS, precondition=case["precondition"], sample_shape=shape).eval()
    largest = case["score"].abs().amax((1, 2, 3))
    for dtype in (torch.float32, torch.float64):
        found = net.to(dtype)(case["x"].to(dtype), case["sigma"])
        assert ((found - case["score"]).abs().amax((1, 2, 3)) <= 1e-4 * largest).all()


# The numbers of parameters of published networks: EDM's without the layer of the augmentations, 9 x 128, which it has
# in training; and that of google/ncsnpp-celebahq-256 on the Hub.
COUNTS = {
    "EDM's DDPM++ for CIFAR-10, 55.7 million (Karras et al. 2022)": (
        55_733_891 - 9 * 128,
        {
            "model_channels": 128,
            "block_out_channels": (256, 256, 256),
            "layers_per_block": 4,
            "attention": (False, True, False),
            "time_embedding_type": "positional",
            "resample_filter": (1, 1),
            "input_pyramid": "none",
        },
    ),
    "NCSN++ for CelebA-HQ, 65.6 million (Song et al. 2021)": (
        65_574_549,
        {
            "block_out_channels": (128, 128, 256, 256, 256, 256, 256),
            "layers_per_block": 2,
            "attention": (False,) * 4 + (True,) + (False,) * 2,
            "input_pyramid": "skip",
            "output_pyramid": "skip",
        },
    ),
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_configurations_have_their_numbers_of_parameters(name):
    count, options = COUNTS[name]
    with on_meta():
        assert sum(parameter.numel() for parameter in NCSNPP(**options).parameters()) == count


# -- Another implementation, from the definitions: dense matrices for filters, sums over pixels, one step at a time


def _down_matrix(size, taps, padding, stride):
    """Zeros around, the filter, every other pixel: (outputs, size)."""
    weights = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    outputs = (size + 2 * padding - len(taps)) // stride + 1
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    for i, (k, weight) in itertools.product(range(outputs), enumerate(weights)):
        j = i * stride + k - padding
        if 0 <= j < size:
            matrix[i, j] += weight
    return matrix


def _up_matrix(size, taps, before, after):
    """Zeros between the pixels, behind the last one, and around; then the filter, with twice the sum: (outputs, size).

    The filter is (1, 3, 3, 1) with 2 zeros before and 1 after, in the notation of upfirdn2d.
    """
    weights = 2 * torch.tensor(taps, dtype=torch.float64) / sum(taps)
    outputs = 2 * size + before + after - len(taps) + 1
    matrix = torch.zeros(outputs, size, dtype=torch.float64)
    for i, (k, weight) in itertools.product(range(outputs), enumerate(weights)):
        j = i + k - before
        if 0 <= j < 2 * size and j % 2 == 0:
            matrix[i, j // 2] += weight
    return matrix


def _along_both(matrix, x):
    return torch.einsum("ih,jw,nchw->ncij", matrix, matrix, x)


class Reference:
    """The network in float64, with the weights by name."""

    def __init__(self, net, options):
        self.weights = {name: tensor.double() for name, tensor in net.state_dict().items()}
        self.taps = tuple(options.get("resample_filter", (1, 3, 3, 1)))
        self.root = math.sqrt(2) if options.get("skip_rescale", True) else 1.0
        self.options = options

    def has(self, name):
        return any(key.startswith(f"{name}.") for key in self.weights)

    def conv(self, name, x, **options):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        groups = min(x.shape[1] // 4, 32)
        grouped = x.reshape(len(x), groups, -1)
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
        normal = ((grouped - mean) / (var + 1e-6).sqrt()).view(x.shape)
        return normal * self.weights[f"{name}.weight"][:, None, None] + self.weights[f"{name}.bias"][:, None, None]

    def halve(self, x):
        return _along_both(_down_matrix(x.shape[-1], self.taps, len(self.taps) // 2 - 1, 2), x)

    def double(self, x, wide=0):
        before, after = (2, 1) if len(self.taps) == 4 else (1, 0)
        return _along_both(_up_matrix(x.shape[-1], self.taps, before + wide, after + wide), x)

    def block(self, name, x, embedding, resample=lambda x: x):
        h = resample(F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv1", h, padding=1)
        h = h + self.linear(f"{name}.time_emb_proj", F.silu(embedding))[:, :, None, None]
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        x = resample(x)
        x = self.conv(f"{name}.conv_shortcut", x) if self.has(f"{name}.conv_shortcut") else x
        return (x + h) / self.root

    def attention(self, name, x):
        if not self.has(name):
            return x
        h = self.norm(f"{name}.group_norm", x).flatten(2).transpose(1, 2)
        q, k, v = (self.linear(f"{name}.{part}", h) for part in ("to_q", "to_k", "to_v"))
        weights = (torch.einsum("npc,nqc->npq", q, k) / math.sqrt(x.shape[1])).exp()
        h = torch.einsum("npq,nqc->npc", weights / weights.sum(2, keepdim=True), v)
        return (x + self.linear(f"{name}.to_out.0", h).transpose(1, 2).view(x.shape)) / self.root

    def embedding(self, c_noise, classes):
        if "time_proj.weight" in self.weights:
            argument = 2 * math.pi * torch.outer(c_noise, self.weights["time_proj.weight"])
        else:
            half = self.weights["time_embedding.linear_1.weight"].shape[1] // 2
            argument = torch.stack([c_noise * 10_000 ** (-i / (half - 1)) for i in range(half)], dim=1)
        features = torch.cat([argument.sin(), argument.cos()], dim=1)
        if classes is not None:
            features = features + self.weights["class_embedding.weight"][classes]
        h = F.silu(self.linear("time_embedding.linear_1", features))
        return self.linear("time_embedding.linear_2", h)

    def __call__(self, x, c_noise, classes=None):
        pyramid = {
            end: self.options.get(f"{end}_pyramid", kind) for end, kind in [("input", "residual"), ("output", "none")]
        }
        layers, scales = self.options["layers_per_block"], len(self.options["block_out_channels"])
        embedding = self.embedding(c_noise.double(), classes)
        image = x.double() * 2 - 1 if self.options.get("center_input_sample") else x.double()
        h = self.conv("conv_in", image, padding=1)
        kept = [h]
        for i in range(scales):
            for j in range(layers):
                h = self.block(f"down_blocks.{i}.resnets.{j}", h, embedding)
                h = self.attention(f"down_blocks.{i}.attentions.{j}", h)
                kept.append(h)
            if i == scales - 1:
                break
            h = self.block(f"down_blocks.{i}.resnet_down", h, embedding, self.halve)
            skip = f"down_blocks.{i}.skip_conv"
            if pyramid["input"] == "skip":
                image = self.halve(image)
                h = h + self.conv(skip, image)
            if pyramid["input"] == "residual":
                # Two zeros around for the filter of four taps, one for that of two; a convolution without padding.
                smooth = _along_both(_down_matrix(image.shape[-1], self.taps, len(self.taps) // 2, 1), image)
                if not self.options.get("pyramid_filter", True):
                    smooth = torch.zeros(*image.shape[:2], *(size + 1 for size in image.shape[2:])).double()
                    smooth[..., :-1, :-1] = image
                image = h = (self.conv(skip, smooth, stride=2) + h) / self.root
            kept.append(h)
        h = self.block("mid_block.resnets.0", h, embedding)
        h = self.attention("mid_block.attentions.0", h)
        h = self.block("mid_block.resnets.1", h, embedding)
        picture = None
        for i in range(scales):
            for j in range(layers + 1):
                h = self.block(f"up_blocks.{i}.resnets.{j}", torch.cat([h, kept.pop()], dim=1), embedding)
            h = self.attention(f"up_blocks.{i}.attentions.0", h)
            top = i == scales - 1
            norm, conv = (
                ("conv_norm_out", "conv_out") if top else (f"up_blocks.{i}.skip_norm", f"up_blocks.{i}.skip_conv")
            )
            if pyramid["output"] == "skip":
                own = self.conv(conv, F.silu(self.norm(norm, h)), padding=1)
                picture = own if picture is None else self.double(picture) + own
            if pyramid["output"] == "residual" and i == 0:
                picture = self.conv(conv, F.silu(self.norm(norm, h)), padding=1)
            elif pyramid["output"] == "residual":
                # The transposed convolution and the filter, cropped once: one more pixel on each side.
                wide = self.double(picture, wide=1)
                picture = h = (self.conv(f"up_blocks.{i}.skip_conv", wide) + h) / self.root
            if not top:
                h = self.block(f"up_blocks.{i}.resnet_up", h, embedding, self.double)
        assert not kept
        return picture if pyramid["output"] == "skip" else self.conv(conv, F.silu(self.norm(norm, h)), padding=1)


BASE = {"block_out_channels": [8, 16, 12], "layers_per_block": 1, "attention": [False, True, False]}
OPTIONS = {
    **{
        f"{''.join(map(str, taps))}, {before}, {after}": {
            "resample_filter": taps,
            "input_pyramid": before,
            "output_pyramid": after,
        }
        for taps in ([1, 3, 3, 1], [1, 1])
        for before in ("none", "skip", "residual")
        for after in ("none", "skip", "residual")
        if taps == [1, 3, 3, 1] or before == after  # the filter does not depend on the pair
    },
    "positional": {"time_embedding_type": "positional"},
    "positional, wider": {"time_embedding_type": "positional", "time_proj_dim": 12, "time_embedding_dim": 20},
    "fourier, narrower": {"time_proj_dim": 8, "model_channels": 4},
    "classes": {"num_class_embeds": 3, "null_class": True},
    "sums not divided": {"skip_rescale": False, "output_pyramid": "residual"},
    "a pyramid without a filter": {"resample_filter": [1, 1], "pyramid_filter": False},
    "centered inside": {"center_input_sample": True, "input_pyramid": "skip"},
    "wide, no attention": {"block_out_channels": [32, 160], "attention": None},
    "one scale": {"block_out_channels": [8], "attention": [True], "output_pyramid": "skip"},
    "one scale, residual": {"block_out_channels": [8], "attention": None, "output_pyramid": "residual"},
    "two layers": {"layers_per_block": 2, "attention": [True, True, True]},
}


MORE = {
    *("1331, none, skip", "1331, skip, none", "1331, residual, none", "1331, none, residual", "11, residual, residual"),
    *("positional, wider", "fourier, narrower", "one scale, residual", "a pyramid without a filter", "two layers"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in OPTIONS]
)
@torch.no_grad()
def test_it_is_another_implementation_of_the_same_network(name, rng):
    options = {**BASE, **OPTIONS[name]}
    net = _random(NCSNPP(**options)).double()
    x, c_noise = torch.randn(2, 3, 8, 8, generator=rng), torch.tensor([0.37, -1.5], dtype=torch.float64)
    classes = torch.tensor([1, 3]) if "num_class_embeds" in options else None
    expected = Reference(net, options)(x, c_noise, classes)
    found = net(x.double(), c_noise, classes)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    single = net.float()(x, c_noise.float(), classes)
    assert (single - expected).norm() <= 2e-5 * expected.norm()


@torch.no_grad()
def test_filters_are_their_matrices(rng):
    x = torch.randn(2, 3, 6, 6, generator=rng, dtype=torch.float64)
    for taps, stride, padding in [((1, 3, 3, 1), 2, 1), ((1, 3, 3, 1), 1, 2), ((1, 1), 1, 1)]:
        expected = _along_both(_down_matrix(6, taps, padding, stride), x)
        torch.testing.assert_close(Filter(taps, stride=stride, padding=padding)(x), expected)
    for margin in (0, 1):
        expected = _along_both(_up_matrix(6, (1, 3, 3, 1), 2 + margin, 1 + margin), x)
        torch.testing.assert_close(fir_up(x, margin), expected)


@torch.no_grad()
def test_with_skips_it_is_the_unet_of_diffusers(rng):
    """From 128 channels on, with the same names of the weights; tests/test_unet.py compares the U-Net to diffusers."""
    widths, attention = (128, 128), (False, True)
    pyramids = {"input_pyramid": "skip", "output_pyramid": "skip"}
    net = _random(NCSNPP(block_out_channels=widths, layers_per_block=1, attention=attention, **pyramids))
    unet = UNet(
        block_out_channels=widths,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=None,
        norm_num_groups=None,
        norm_eps=1e-6,
        mid_block_scale_factor=2**0.5,
        time_embedding_type="fourier",
    )
    unet.load_state_dict(net.state_dict())
    x, c_noise = torch.randn(1, 3, 4, 4, generator=rng), torch.tensor([0.37])
    torch.testing.assert_close(net(x, c_noise), unet.eval()(x, c_noise), rtol=1e-4, atol=1e-4)


# -- Laws


@pytest.mark.slow
def test_gradients_reach_every_parameter(rng):
    for name in ("1331, residual, residual", "11, skip, skip", "classes"):
        options = {**BASE, **OPTIONS[name]}
        net = _random(NCSNPP(**options)).train()
        classes = torch.tensor([0, 1, 2, 3]) if "num_class_embeds" in options else None
        x, c_noise = torch.randn(4, 3, 8, 8, generator=rng), torch.tensor([0.3, -1.0, 0.1, 2.0])
        net(x, c_noise, classes).sin().sum().backward()
        for path, parameter in net.named_parameters():
            if path != "time_proj.weight":
                assert parameter.grad is not None and parameter.grad.any(), (name, path)


@torch.no_grad()
def test_filters_are_no_weights(rng):
    net = _random(NCSNPP(**BASE))
    assert [name for name, _ in net.named_buffers()] and not [name for name in net.state_dict() if "kernel" in name]
    with on_meta():
        empty = NCSNPP(**BASE)
    assert all(kernel.is_meta for kernel in empty.buffers())


@torch.no_grad()
def test_a_network_on_patches_is_one_on_more_channels(rng):
    net = _random(NCSNPP(**BASE, patch=2, input_pyramid="skip", output_pyramid="skip"))
    inner = NCSNPP(12, 12, **BASE, input_pyramid="skip", output_pyramid="skip").eval()
    inner.load_state_dict(net.state_dict())
    x, c_noise = torch.randn(2, 3, 16, 16, generator=rng), torch.zeros(2)
    assert torch.equal(net(x, c_noise), F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2), c_noise), 2))
    assert net(x[:, :, :13], c_noise).shape == (2, 3, 13, 16)
    with pytest.raises(ValueError, match="every side of x must be at least 8, the largest stride, got 7x16"):
        net(x[:, :, :7], c_noise)


# -- Networks to train

SMALL = {"widths": (8, 16), "layers_per_block": 1, "schedule": LEVELS}
KINDS = {
    "NCSN++": {},
    "as published": {"precondition": "ncsnpp"},
    "256 pixels": {"input_pyramid": "skip", "output_pyramid": "skip"},
    "DDPM++": {"embedding": "positional", "resample_filter": (1, 1), "input_pyramid": "none", "precondition": "vp"},
    "classes": {"classes": 3, "null_class": True},
    "image": {"condition_channels": 2},
    "patches": {"patch": 2, "precondition_options": {"sigma_data": 0.25}},
}


def _condition(net, n, rng, size=8):
    takes = net.conditioning
    if takes.classes is not None:
        return torch.arange(n) % (takes.classes + 1)
    return torch.rand(n, takes.channels, size, size, generator=rng) if takes.channels else None


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_returns_the_prior_of_its_row(kind, rng):
    """Its output is zero, which is N(1/2, (sigma_data / 2)^2) for "karras", and the score zero for the other rows."""
    net = ScoreNet.ncsnpp(3, 8, **SMALL, **KINDS[kind]).eval()
    x = torch.rand(2, 3, 8, 8, generator=rng)
    deviation = KINDS[kind].get("precondition_options", {"sigma_data": 0.5})["sigma_data"] / 2
    expected = -(x - 0.5) / (deviation**2 + 0.09) if net.precondition == "karras" else torch.zeros_like(x)
    torch.testing.assert_close(net(x, 0.3, _condition(net, 2, rng)), expected)


@pytest.mark.parametrize(
    "kind", [kind if kind in ("NCSN++", "classes") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_new_network_trains_travels_and_samples(kind, tmp_path, rng):
    torch.manual_seed(0)
    net = ScoreNet.ncsnpp(3, 8, **SMALL, **KINDS[kind], dropout=0)
    x, condition = torch.rand(4, 3, 8, 8, generator=rng), _condition(net, 4, rng)
    optimizer, losses = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(10):
        losses.append(dsm_loss(net, x, sigma=0.3, condition=condition, generator=1))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    net.eval().save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = ScoreNet.from_pretrained(tmp_path)
    assert again.config == net.config and again.conditioning == net.conditioning
    with torch.no_grad():
        assert torch.equal(again(x, 0.3, condition), net(x, 0.3, condition))
    sampler = ODESampler(again, levels=3)
    images = run(sampler, 2, condition=None if condition is None else condition[:2], generator=0)
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()


def test_the_defaults_are_the_published_network_for_cifar10():
    with on_meta():
        net = ScoreNet.ncsnpp()
    config = net.config
    assert config["family"] == "ncsnpp" and config["block_out_channels"] == [128, 256, 256, 256]
    assert config["attention"] == [False, True, False, False]  # at 16 pixels
    assert (config["layers_per_block"], config["dropout"], config["input_pyramid"]) == (4, 0.1, "residual")
    assert net.schedule == NoiseSchedule.geometric(50, 0.01, 1000) and net.precondition == "karras"


@pytest.mark.slow
def test_attention_is_at_16_pixels():
    with on_meta():
        nets = [
            ScoreNet.ncsnpp(3, size, widths=(8,) * 5, layers_per_block=1, patch=patch)
            for size, patch in [(256, 1), ((64, 96), 1), (64, 2), (48, 1)]
        ]
    found = [net.config["attention"].index(True) if any(net.config["attention"]) else None for net in nets]
    assert found == [4, 2, 1, None]


@pytest.mark.parametrize("row", ROWS)
def test_the_network_centers_the_image_where_the_row_does_not(row):
    net = ScoreNet.ncsnpp(3, 8, **SMALL, precondition=row)
    assert net.config["center_input_sample"] == (row in ("ncsn", "ncsnv2", "ncsnpp", "ncsnpp_index"))


def test_new_weights_have_the_authors_variances():
    torch.manual_seed(0)
    net = ScoreNet.ncsnpp(3, 8, widths=(64, 64), layers_per_block=1, classes=10, attention=(True, True)).backbone
    variances = {
        "down_blocks.0.resnets.0.conv1": 2 / (2 * 9 * 64),
        "time_embedding.linear_1": 2 / (128 + 256),
        "mid_block.attentions.0.to_q": 0.1 / 64,
        "class_embedding": 10 * 2 / (10 + 128),
        "mid_block.attentions.0.to_out.0": 0,
        "up_blocks.0.resnets.1.conv2": 0,
    }
    for name, variance in variances.items():
        weight = net.get_submodule(name).weight
        assert abs(weight.var() - variance) <= 0.1 * variance
        assert weight.abs().max() <= math.sqrt(3 * variance)
    biases = [module.bias for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert not any(bias.any() for bias in biases)


# -- Configurations and errors


def test_attention_is_at_the_given_scales_and_in_the_middle():
    for given in (None, [False] * 3, [True, False, False], [False, True, True]):
        net = NCSNPP(**{**BASE, "attention": given})
        found = {path.split(".attentions")[0] for path, part in net.named_modules() if isinstance(part, Attention)}
        scales = [i for i, attended in enumerate(given or ()) if attended]
        assert found == {"mid_block", *(f"down_blocks.{i}" for i in scales), *(f"up_blocks.{2 - i}" for i in scales)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": [True]}, "one entry per scale, at least one, got 3 and 1"),
        ({"block_out_channels": [], "attention": []}, "at least one, got 0 and 0"),
        ({"resample_filter": [1, 2, 1]}, r"resample_filter must be one of \[1, 1\], \[1, 3, 3, 1\], got \[1, 2, 1\]"),
        ({"input_pyramid": "sum"}, "input_pyramid must be one of 'none', 'skip', 'residual', got 'sum'"),
        ({"output_pyramid": None}, "output_pyramid must be one of 'none', 'skip', 'residual', got None"),
        (
            {"time_embedding_type": "learned"},
            "time_embedding_type must be one of 'positional', 'fourier', got 'learned'",
        ),
        ({"time_proj_dim": 5}, "time_proj_dim, must be even, got 5"),
        ({"null_class": True}, "null_class=True needs classes"),
        ({"block_out_channels": [8, 8, 136]}, "multiples of 4 up to 128 and multiples of 32 above, got 136 channels"),
        ({"block_out_channels": [8, 68, 68]}, "and their sums .* got 136 channels"),
        ({"block_out_channels": [2, 8, 8]}, "must be multiples of 4 .* got 2 channels"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NCSNPP(**{**BASE, **options})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("resample_filter", [1, 2, 1], r"resample_filter must be one of \[1, 1\], \[1, 3, 3, 1\], got \[1, 2, 1\]"),
        ("attention", [1, 0], "attention must be a list .* each true or false, or null, got"),
        ("block_out_channels", ..., "lacks block_out_channels"),
        (
            "precondition_options",
            {"sigma": 1.0},
            "precondition_options has an unknown key, 'sigma'; the known keys are sigma_data",
        ),
        ("precondition_options", {"sigma_data": 0.0}, "precondition_options: sigma_data must be a number of at least"),
        ("precondition_options", 3, "precondition_options must be an object"),
    ],
)
def test_configurations_that_are_refused(key, value, message, tmp_path):
    ScoreNet.ncsnpp(3, 8, **SMALL).save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), key: value}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        ScoreNet.from_pretrained(tmp_path)
