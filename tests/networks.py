"""Small networks of every family and of every option that changes how they compute, for laws of all of them."""

import torch

from scorematch import NoiseSchedule, ScoreNet
from scorematch.nets import FAMILIES
from scorematch.nets.family import Condition

LEVELS = NoiseSchedule.geometric(10, 0.01, 6)
CHANNELS = 5  # of the images; no number of features below is a multiple of it
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


_NCSNPP = {"time_embedding_type": "fourier", "mid_block_scale_factor": 2**0.5, "norm_num_groups": None}
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
    "unet, variance": _unet(precondition="ddpm", out_channels=2 * CHANNELS),
    "unet, image and variance": _unet(in_channels=2 * CHANNELS, out_channels=2 * CHANNELS),
    "unet, patches": _unet(patch=2),
    "unet, pixels": _unet(patch=2, pixel_channels=4),
    "ncsnpp": _unet("SkipDownBlock2D", "ncsnpp", **_NCSNPP),
    "ncsnpp, attention": _unet(
        "AttnSkipDownBlock2D", "ncsnpp", **_NCSNPP, block_out_channels=[32, 32], attention_head_dim=None
    ),
    "ncsnpp, image": _unet("SkipDownBlock2D", "ncsnpp", in_channels=2 * CHANNELS, **_NCSNPP),
}
CONDITIONS = {
    "unet, image": Condition(channels=CHANNELS),
    "unet, image and variance": Condition(channels=CHANNELS),
    "ncsnpp, image": Condition(channels=CHANNELS),
    "unet, classes": Condition(classes=3),
}


def backbone(name):
    """With random weights, none of them special: norms of ones, or alike at all levels, hide much."""
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


def images(n, rng, channels=CHANNELS, size=SIZE):
    return torch.rand(n, channels, size, size, generator=rng)


def condition(name, n, rng, size=SIZE):
    """A condition of the kind that the network takes, or None."""
    takes = CONDITIONS.get(name, Condition())
    if takes.classes is not None:
        return torch.randint(takes.classes, (n,), generator=rng)
    return images(n, rng, takes.channels, size) if takes.channels else None
