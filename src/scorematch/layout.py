r"""Networks in the layout of diffusers, as the Hugging Face Hub keeps them, read as this package's own configurations.

A flat repository has ``config.json`` and ``scheduler_config.json`` side by side, a pipeline has ``unet/config.json``
and ``scheduler/scheduler_config.json``. The first says how the U-Net is built; the second says what its output means
and which noise levels it knows:

- a DDPM's betas (linear, scaled_linear, squaredcos_cap_v2, sigmoid, or given), with an output that is the noise, v or
  the clean image, in units of images in [-1, 1];
- the ladder of a variance exploding network, NCSN++ (its output is sigma times the score, sigma its input) or the
  NCSN of diffusers-ncsn (its output is the score, the index of the level its input), in units of images in [0, 1].

Weights come under old names and new ones; ``current_names`` knows both.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scorematch.nets.unet import UNet
from scorematch.noise import NoiseSchedule

UNET_CLASSES = ("UNet2DModel", "UNet2DModelForNCSN")
UNET_KEYS = tuple(inspect.signature(UNet).parameters)

# What a DDPM's output is -> its row of the preconditioning table.
_PREDICTIONS = {"epsilon": "ddpm", "v_prediction": "ddpm_v", "sample": "ddpm_x0"}

# Options of diffusers' network that this one does not have, with the values at which it does not need them.
_ABSENT = {
    "time_embedding_dim": (None,),
    "class_embed_type": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
}


def translate(config: Mapping[str, Any], scheduler: Mapping[str, Any] | None) -> dict[str, Any]:
    """A network's configuration and its scheduler's, as diffusers writes them -> the configuration of a ScoreNet.

    Args:
        config: the content of the network's config.json.
        scheduler: the content of scheduler_config.json, or None if there is none.

    Returns:
        The configuration, less its format version.

    Raises:
        ValueError: for a network or a scheduler that is not a score of pixels, or an option that is not here.
    """
    for key, values in _ABSENT.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"the network's {key} is {config[key]!r}, which is not here.")
    if scheduler is None:
        raise ValueError(
            "the folder has no scheduler_config.json, which says what the network's output means and which noise "
            "levels it knows. Fetch it from the same repository, to lie beside config.json or in scheduler/."
        )
    # A missing key is diffusers' default, which is this U-Net's; in old configurations it stands for nothing else.
    unet = {key: config[key] for key in UNET_KEYS if key in config}
    size = config.get("sample_size")
    size = size if isinstance(size, list | tuple) or size is None else (size, size)
    # The image's: what goes in beyond them is a condition, what comes out beyond them a variance.
    channels = min(unet.get("in_channels", 3), unet.get("out_channels", 3))
    schedule, precondition = _schedule(config, scheduler)
    return {
        "family": "unet",
        **unet,
        "precondition": precondition,
        "sample_shape": None if size is None else [channels, *size],
        "value_range": [0.0, 1.0],
        "sampler": _sampler_settings(schedule, precondition),
        "schedule": schedule.to_dict(),
    }


def _sampler_settings(schedule: NoiseSchedule, precondition: str) -> dict[str, Any] | None:
    """Recommended settings: consistent sampling in 250 calls with the step 1 - r^p, in units of sigma^2.

    r is the ratio of a level to the one before: without noise at p = 1, with that of ancestral sampling at 2. How p was
    chosen stands in docs/pretrained.md: for a DDPM by what is published of networks like it (Song et al. 2021,
    Denoising Diffusion Implicit Models, arXiv:2010.02502, Table 1) and by what small ones do; for NCSN++ it is the
    published step of variance exploding networks, 1.5 (1 - r) (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475).
    """
    if precondition == "ncsn" or len(schedule) < 2:
        return None
    levels, p = min(250, len(schedule)), 1.5 if precondition == "ncsnpp" else 1.1
    ratio = (schedule.sigma_min / schedule.sigma_max) ** (1 / (levels - 1))
    return {"levels": levels, "step_size": (1 - ratio**p) * schedule.sigma_min**2, "consistent": True}


def _schedule(config: Mapping[str, Any], scheduler: Mapping[str, Any]) -> tuple[NoiseSchedule, str]:
    name = scheduler.get("_class_name")
    if config.get("_class_name") == "UNet2DModelForNCSN" or config.get("time_embedding_type") == "fourier":
        levels = scheduler.get("num_train_timesteps") or 2000
        missing = [key for key in ("sigma_max", "sigma_min") if key not in scheduler]
        if missing:
            raise ValueError(f"the scheduler {name!r} of a variance exploding network lacks {' and '.join(missing)}.")
        ladder = NoiseSchedule.geometric(scheduler["sigma_max"], scheduler["sigma_min"], levels)
        return ladder, "ncsn" if config.get("_class_name") == "UNet2DModelForNCSN" else "ncsnpp"
    if "beta_start" not in scheduler and scheduler.get("trained_betas") is None:
        raise ValueError(f"the scheduler {name!r} is not that of a DDPM: it has no beta_start and no trained_betas.")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr makes the loudest level infinite, which a ladder cannot hold.")
    # Until the end of 2022 diffusers wrote predict_epsilon.
    prediction = scheduler.get("prediction_type", "epsilon" if scheduler.get("predict_epsilon", True) else "sample")
    if prediction not in _PREDICTIONS:
        known = ", ".join(map(repr, _PREDICTIONS))
        raise ValueError(f"prediction_type must be one of {known}, got {prediction!r}.")
    # In float32, as diffusers' schedulers compute it: at the quietest steps 1 - alpha_bar is off by 1e-5 of itself, and
    # with it what the network was told was its noise level.
    alpha_bar = torch.cumprod(1 - _betas(scheduler), 0).double()
    return NoiseSchedule(0.5 * (1 / alpha_bar - 1).sqrt().flip(0)), _PREDICTIONS[prediction]


def _betas(scheduler: Mapping[str, Any]) -> Tensor:
    """The variances of a DDPM's steps, (T,) float32, the first step first."""
    if scheduler.get("trained_betas") is not None:
        return torch.tensor(scheduler["trained_betas"], dtype=torch.float32)
    start, end = scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02)
    steps, kind = scheduler.get("num_train_timesteps", 1000), scheduler.get("beta_schedule", "linear")
    if kind == "linear":
        return torch.linspace(start, end, steps)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17
        alpha_bar = torch.cos((torch.arange(steps + 1).double() / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
    raise ValueError(f"beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, got {kind!r}.")


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's weights under their current names, without twins and buffers.

    Attention was named query, key, value and proj_attn until 2023 and sometimes kept as 1x1 convolutions;
    ``time_proj.W`` is a twin of ``time_proj.weight``, ``downsamplers.0.op`` one of ``downsamplers.0.conv``.
    """
    current = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)", name)
        if match:
            name = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
        if ".attentions." in name and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        if name == "time_proj.W":
            name = "time_proj.weight"
        current[name.replace(".downsamplers.0.op.", ".downsamplers.0.conv.")] = tensor
    return current
