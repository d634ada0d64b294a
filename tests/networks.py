"""Small networks of every family and with every option that changes the computation, for tests of all networks."""

import functools

import pytest
import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.core.conditions import Condition
from scorematch.nets import FAMILIES, UNet

LEVELS = NoiseSchedule.geometric(10, 0.01, 6)
CHANNELS = 5  # channels of the images; no number of features below is a multiple of it
SIZE = 8


def _refinenet(family, precondition, depth="standard"):
    return family, precondition, {"channels": CHANNELS, "width": 4, "depth": depth}


def _unet(kind="DownBlock2D", precondition="karras", **options):
    architecture = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": [8, 16],
        "down_block_types": [kind] * 2,
        "up_block_types": [kind.replace("Down", "Up")] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "add_attention": "Attn" in kind,
    }
    return "unet", precondition, {**architecture, **options}


def _ncsnpp(precondition="karras", **options):
    architecture = {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "attention": [False, True],
    }
    return "ncsnpp", precondition, {**architecture, **options}


_ADM = {
    "norm_num_groups": None,
    "attn_norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift",
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_heads": [1, 2],
    "num_class_embeds": 3,
    "null_class": True,
    "time_proj_dim": 4,
    "time_embedding_dim": 12,
}
_NCSNPP = {"time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5, "norm_num_groups": None}
_DDPMPP = {"time_embedding_type": "positional", "resample_filter": [1, 1], "input_pyramid": "none"}
# Name -> the family, the row of the preconditioning table, and the family's part of the configuration.
NETS = {
    "ncsn": _refinenet("ncsn", "ncsn"),
    "ncsn, deeper": _refinenet("ncsn", "ncsn", "deeper"),
    "ncsnv2": _refinenet("ncsnv2", "ncsnv2"),
    "ncsnv2, deeper": _refinenet("ncsnv2", "karras", "deeper"),
    "unet": _unet(precondition="ddpm"),
    "unet, one head": _unet("AttnDownBlock2D", attention_head_dim=None),
    "unet, heads": _unet("AttnDownBlock2D", attention_head_dim=4),
    "unet, one narrow head": _unet("AttnDownBlock2D", precondition="ddpm_v", attention_head_dim=6),
    "unet, scale and shift": _unet(resnet_time_scale_shift="scale_shift", act_fn="gelu"),
    "unet, residual resampling": _unet("ResnetDownsampleBlock2D", precondition="ddpm_x0"),
    "unet, image": _unet(in_channels=2 * CHANNELS),
    "unet, classes": _unet("AttnDownBlock2D", attention_head_dim=None, num_class_embeds=3),
    "unet, numbers": _unet(class_embed_type="timestep"),
    "unet, vectors": _unet(class_embed_type="identity", time_embedding_dim=12, precondition="ddpm"),
    "unet, no middle": _unet(mid_block_type=None),
    "unet, variance": _unet(precondition="ddpm", out_channels=2 * CHANNELS),
    "unet, image and variance": _unet(in_channels=2 * CHANNELS, out_channels=2 * CHANNELS),
    "unet, patches": _unet(patch=2),
    "unet, pixels": _unet(patch=2, pixel_channels=4),
    "unet, ADM": _unet("AttnDownBlock2D", "vp", **_ADM),
    "unet, heads and rescaled time": _unet(
        "AttnDownBlock2D", "ddpm", attention_heads=[4, 4], attention_heads_up=[1, 2], time_factor=0.25
    ),
    "ncsnpp": _unet("SkipDownBlock2D", "ncsnpp", **_NCSNPP),
    "ncsnpp, attention": _unet(
        "AttnSkipDownBlock2D", "ncsnpp", **_NCSNPP, block_out_channels=[32, 32], attention_head_dim=None
    ),
    "ncsnpp, image": _unet("SkipDownBlock2D", "ncsnpp", in_channels=2 * CHANNELS, **_NCSNPP),
    "NCSN++": _ncsnpp("ncsnpp", center_input_sample=True),
    "NCSN++, skips": _ncsnpp(input_pyramid="skip", output_pyramid="skip"),
    "NCSN++, sums": _ncsnpp(output_pyramid="residual", block_out_channels=[8, 16, 16], attention=None),
    "NCSN++, index": _ncsnpp("ncsnpp_index", time_embedding_type="positional", model_channels=4),
    "NCSN++, image": _ncsnpp(in_channels=2 * CHANNELS, input_pyramid="skip"),
    "NCSN++, patches": _ncsnpp(patch=2, input_pyramid="skip", output_pyramid="skip"),
    "DDPM++": _ncsnpp("subvp", **_DDPMPP),
    "DDPM++, classes": _ncsnpp(**_DDPMPP, num_class_embeds=3, null_class=True, model_channels=4),
    "DDPM++, variance": _ncsnpp("ddpm", **_DDPMPP, out_channels=2 * CHANNELS),
    "DDPM++, sums": _ncsnpp(
        **{**_DDPMPP, "input_pyramid": "residual", "output_pyramid": "residual"}, skip_rescale=False
    ),
}
CONDITIONS = {
    "unet, image": Condition(channels=CHANNELS),
    "unet, image and variance": Condition(channels=CHANNELS),
    "ncsnpp, image": Condition(channels=CHANNELS),
    "unet, classes": Condition(classes=3),
    "unet, numbers": Condition(vector=1),
    "unet, vectors": Condition(vector=12),
    "unet, ADM": Condition(classes=3, null_class=True),
    "NCSN++, image": Condition(channels=CHANNELS),
    "DDPM++, classes": Condition(classes=3, null_class=True),
}


def every_net(quick):
    """Parametrizes a test by the names of all networks; those outside ``quick`` are slow tests."""
    return pytest.mark.parametrize(
        "name", [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
    )


# One network for each code path is quick.
every_path = every_net(
    {
        *("ncsn", "ncsnv2, deeper", "unet, heads", "unet, pixels", "unet, image and variance", "ncsnpp, attention"),
        *("unet, ADM", "NCSN++, skips", "DDPM++, classes"),
    }
)


def backbone(name):
    """A backbone in which all weights are random; initial values such as ones in the norms could hide errors."""
    family, precondition, architecture = NETS[name]
    torch.manual_seed(0)
    made = FAMILIES[family].build(architecture, levels=len(LEVELS), precondition=precondition)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if parameter.ndim == 1 or "embed.weight" in path:
                parameter.copy_(0.5 + 0.3 * torch.randn(parameter.shape))
    return made.eval()


def network(name):
    return ScoreNet(
        backbone(name),
        LEVELS,
        precondition=NETS[name][1],
        sample_shape=(CHANNELS, SIZE, SIZE),
        predicts_variance="variance" in name,
    )


@functools.cache
def shared(name):
    """The network of all tests that do not change it."""
    return network(name)


def images(n, rng, channels=CHANNELS, size=SIZE):
    return torch.rand(n, channels, size, size, generator=rng)


def condition(name, n, rng, size=SIZE):
    """A condition of the kind that the network takes, or None if it takes none."""
    takes = CONDITIONS.get(name, Condition())
    if takes.classes is not None:
        return torch.randint(takes.classes + takes.null_class, (n,), generator=rng)
    if takes.vector:
        return torch.rand(n, takes.vector, generator=rng)
    return images(n, rng, takes.channels, size) if takes.channels else None


def built(architecture, schedule, precondition, sample_shape):
    """A network with new weights from the family's part of a configuration, which can be saved."""
    family, keys = FAMILIES[architecture["family"]], dict(architecture)
    del keys["family"]
    made = family.build(keys, levels=len(schedule), precondition=precondition)
    net = ScoreNet(made, schedule, precondition=precondition, sample_shape=sample_shape)
    net._architecture = architecture
    return net


# -- Wider networks, for tests of devices

WIDE_LEVELS = NoiseSchedule.geometric(10, 0.01, 12)
FOURIER = {"time_embedding_type": "fourier", "precondition": "ncsnpp", "norm_num_groups": None}


def wide_unet(kind="DownBlock2D", precondition="karras", *, image=0, **options):
    """A U-Net for color images, which takes an image with ``image`` channels as its condition."""
    backbone = UNet(
        3 + image,
        3,
        block_out_channels=(32, 64),
        down_block_types=(kind,) * 2,
        up_block_types=(kind.replace("Down", "Up"),) * 2,
        **{"norm_num_groups": 8, **options},
    )
    return ScoreNet(backbone, WIDE_LEVELS, precondition=precondition, sample_shape=(3, 32, 32))


def wide_ncsnpp(**options):
    return ScoreNet.ncsnpp(3, 32, widths=(32, 64), layers_per_block=1, schedule=WIDE_LEVELS, **options)


def wide_ddpmpp(pyramid):
    """A DDPM++ with five classes and a null class, which has input and output pyramids of this kind."""
    return wide_ncsnpp(
        embedding="positional",
        resample_filter=(1, 1),
        input_pyramid=pyramid,
        output_pyramid=pyramid,
        classes=5,
        null_class=True,
        precondition="vp",
    )
